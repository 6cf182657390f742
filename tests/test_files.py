"""Recorded runs: every format gives the frames that were written, in the order asked for, with what the file says of the detector."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
import structlog
import tifffile

from streamprior.config import PositionSettings, SourceSettings
from streamprior.crew import ThreadCrew
from streamprior.errors import ConfigError, WireError
from streamprior.join import Joiner
from streamprior.outbox import Outbox
from streamprior.pipeline import Pipeline, Wire
from streamprior.records import Detector, Frame, SeriesEnd, SeriesStart
from streamprior.runs import Runs
from streamprior.seams import Message
from streamprior.sources.files import AsRead, FileSource, file_source, open_recording
from streamprior.sources.follow import GrowingFile
from streamprior.sources.recording import FrameDamaged
from tests.builders import diffraction
from tests.test_path import House, Kept

SHAPE = (6, 5, 4)
FRAMES = np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)
CXI = "entry_1/instrument_1/detector_1"


def hdf5(path: Path, **datasets: Any) -> Path:
    """A file with datasets under names in which "__" stands for "/"."""
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name.replace("__", "/")] = values
    return path


def cxi(path: Path, **more: Any) -> Path:
    return hdf5(path, **({f"{CXI}/data": FRAMES} | {name.replace("detector", CXI): values for name, values in more.items()}))


def npy(path: Path) -> Path:
    np.save(path, FRAMES)
    return path


def tiffs(path: Path, frames: Any = FRAMES, **options: Any) -> Path:
    path.mkdir()
    for index, frame in enumerate(frames):
        tifffile.imwrite(path / f"scan_{index:04d}.tif", frame, **options)
    return path


@pytest.mark.parametrize("kind", ["npy", "cxi", "tiffs", "big-endian tiffs", "nexus", "only stack", "named", "compressed"])
def test_every_format_gives_the_frames_that_were_written(kind: str, tmp_path: Path) -> None:
    made: dict[str, Any] = {
        "npy": lambda: npy(tmp_path / "a.npy"),
        "cxi": lambda: cxi(tmp_path / "a.cxi"),
        "tiffs": lambda: tiffs(tmp_path / "scan"),
        "big-endian tiffs": lambda: tiffs(tmp_path / "scan", byteorder=">"),
        "nexus": lambda: hdf5(tmp_path / "a.nxs", entry__data__data=FRAMES, other=FRAMES),
        "only stack": lambda: hdf5(tmp_path / "a.h5", somewhere__frames=FRAMES, flat=FRAMES[0], times=np.arange(6)),
        "named": lambda: f"{hdf5(tmp_path / 'a.h5', one=FRAMES + 1, two__deep=FRAMES)}::/two/deep",
        "compressed": lambda: compressed(tmp_path / "a.h5"),
    }
    recording = open_recording(made[kind]())
    assert (len(recording), recording.shape, recording.dtype.newbyteorder("=")) == (6, SHAPE, np.uint16)
    for index in range(6):
        np.testing.assert_array_equal(recording.frame(index), FRAMES[index])
        np.testing.assert_array_equal(recording[index], FRAMES[index])
        assert recording.origin(index) == index
        assert recording.position(index) is None
    assert recording.detector().shape == SHAPE[1:]


def compressed(path: Path) -> Path:
    """As detectors write it."""
    with h5py.File(path, "w") as file:
        file.create_dataset("entry/data/data", data=FRAMES, chunks=(1, 5, 4), **hdf5plugin.Bitshuffle())
    return path


@pytest.mark.parametrize(
    ("frames", "indices"),
    [
        (":", [0, 1, 2, 3, 4, 5]),
        ("1::2", [1, 3, 5]),
        (":2", [0, 1]),
        ("-2:", [4, 5]),
        ("::-2", [5, 3, 1]),
        (" 1 : 3 ", [1, 2]),
        ("4:100", [4, 5]),
        ("3", [3]),
        ("-1", [5]),
        ("-6", [0]),
    ],
)
def test_a_slice_picks_what_it_picks_in_python(frames: str, indices: list[int], tmp_path: Path) -> None:
    recording = open_recording(npy(tmp_path / "a.npy"), frames)
    assert [recording.origin(i) for i in range(len(recording))] == indices
    np.testing.assert_array_equal([recording.frame(i) for i in range(len(recording))], FRAMES[indices])


@pytest.mark.parametrize("frames", ["", "a", "1:b", "1:2:3:4", "::0", "1.5", "1,2"])
def test_a_slice_that_is_none_is_said_with_an_example(frames: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a Python slice; write for example 0::2"):
        open_recording(npy(tmp_path / "a.npy"), frames)


@pytest.mark.parametrize("frames", ["6", "-7", "6:", "3:3", "0:5:-1"])
def test_a_slice_that_picks_nothing_names_file_and_number_of_frames(frames: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"picks none of the 6 frames of .*a\.npy"):
        open_recording(npy(tmp_path / "a.npy"), frames)


def test_what_a_cxi_file_says_of_the_detector_is_read(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE[1:], np.uint32)
    mask[2, 3] = 0x10
    path = cxi(
        tmp_path / "a.cxi",
        **{
            "detector/mask": mask,
            "detector/distance": 0.5,
            "detector/x_pixel_size": 55e-6,
            "detector/count_time": 0.01,
            "entry_1/instrument_1/source_1/energy": 9000 * 1.602176634e-19,
            "entry_1/title": "gold",
        },
    )
    recording = open_recording(path)
    detector = recording.detector()
    assert detector.mask is not None
    assert np.argwhere(detector.mask).tolist() == [[2, 3]]
    assert (detector.distance_m, detector.pixel_m, detector.frame_time_s) == (0.5, 55e-6, 0.01)
    assert detector.energy_ev == pytest.approx(9000)
    assert recording.metadata["title"] == "gold"


def test_numbers_in_arrays_of_one_are_read_and_other_shapes_are_passed_over(tmp_path: Path) -> None:
    path = cxi(
        tmp_path / "a.cxi",
        **{
            "detector/distance": [0.5],
            "detector/x_pixel_size": [1.0, 2.0],
            "detector/count_time/value": 3.0,
            "detector/mask": np.ones((2, 2)),
            "entry_1/instrument_1/source_1/energy": [1.602176634e-19],
        },
    )
    recording = open_recording(path)
    detector = recording.detector()
    assert (detector.distance_m, detector.pixel_m, detector.frame_time_s, detector.mask) == (0.5, None, None, None)
    assert detector.energy_ev == pytest.approx(1)


def test_frames_that_are_linked_to_still_have_their_detector(tmp_path: Path) -> None:
    """NeXus keeps the frames under /entry/data, often as a link, and what is known of them under the instrument."""
    bad = np.zeros(SHAPE[1:], np.uint32)
    bad[1, 1] = 1
    path = hdf5(tmp_path / "a.nxs", entry__instrument__detector__distance=0.7, entry__instrument__detector__pixel_mask=bad)
    with h5py.File(path, "a") as file:
        file["entry/instrument/detector/data"] = FRAMES
        file["entry/data/data"] = h5py.SoftLink("/entry/instrument/detector/data")
    detector = open_recording(path).detector()
    assert detector.distance_m == 0.7
    assert detector.mask is not None
    assert np.argwhere(detector.mask).tolist() == [[1, 1]]


def test_positions_are_the_probes_on_the_sample_and_follow_the_slice(tmp_path: Path) -> None:
    moved = np.column_stack([np.arange(6) * 1e-6, -np.arange(6) * 2e-6, np.zeros(6)])
    path = cxi(tmp_path / "a.cxi", **{"entry_1/sample_1/geometry_1/translation": moved})
    recording = open_recording(path, "1::2")
    positions = [recording.position(i) for i in range(3)]
    np.testing.assert_allclose(positions, -moved[1::2, :2])


def test_positions_of_another_number_are_passed_over(tmp_path: Path) -> None:
    path = cxi(tmp_path / "a.cxi", **{"entry_1/sample_1/geometry_1/translation": np.zeros((5, 3))})
    assert open_recording(path).position(0) is None


def test_what_cannot_be_opened_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no frames")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.tif").write_bytes(b"no image")
    (tmp_path / "broken.npy").write_bytes(b"no array")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "flat.npy", FRAMES[0])
    for name in ("mixed", "stacks"):
        (tmp_path / name).mkdir()
    (tmp_path / "mixed" / "a.tif").touch()
    (tmp_path / "mixed" / "a.edf").touch()
    tifffile.imwrite(tmp_path / "stacks" / "a.tif", FRAMES)
    cxi(tmp_path / "dark.cxi", **{"detector/data_dark": np.zeros((2, 3))})
    (tmp_path / "broken.edf").write_bytes(b"no image")
    (tmp_path / "text.tif").write_text("no image")
    whole = cxi(tmp_path / "whole.cxi").read_bytes()
    (tmp_path / "cut.cxi").write_bytes(whole[: len(whole) // 2])
    for name, words in {
        "missing.cxi": "no such file",
        "text.txt": "neither HDF5",
        "empty": "without TIFF files and without EDF files",
        "mixed": "a folder of TIFF and of EDF files",
        "stacks": "holds 6 frames; name this file",
        "dark.cxi": r"data_dark of shape \(2, 3\) is no dark of frames of \(5, 4\)",
        "broken.edf": "cannot be read as EDF",
        "text.tif": "cannot be read as TIFF",
        "broken": "a.tif: cannot be read as TIFF",
        "broken.npy": "cannot be read as .npy",
        "objects.npy": "cannot be read as .npy",
        "flat.npy": r"must be a stack .*\(5, 4\)",
        "cut.cxi": "cannot be read as HDF5",
        "whole.cxi::/nothing": "no dataset /nothing",
        "whole.cxi::/entry_1": "no dataset /entry_1",
    }.items():
        with pytest.raises(ConfigError, match=words) as refused:
            open_recording(tmp_path / name)
        assert name.partition("::")[0].partition("/")[0] in str(refused.value)


def test_a_file_without_a_stack_or_with_several_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stack of frames"):
        open_recording(hdf5(tmp_path / "none.h5", flat=FRAMES[0]))
    with pytest.raises(ConfigError, match=r"name one: .*several\.h5::/one, .*several\.h5::/two"):
        open_recording(hdf5(tmp_path / "several.h5", one=FRAMES, two=FRAMES))
    with pytest.raises(ConfigError, match="must be a stack"):
        open_recording(f"{hdf5(tmp_path / 'flat.h5', flat=FRAMES[0])}::/flat")


def test_a_file_source_gives_start_frames_and_end_and_is_then_exhausted(tmp_path: Path) -> None:
    source = FileSource(SourceSettings(kind="file", name="disk", path=npy(tmp_path / "run.npy"), frames="1::2"))
    source.open()
    seen = []
    while not source.exhausted:
        seen.append(source.receive(0.1))
    start, *frames, end = seen
    assert isinstance(start, SeriesStart)
    assert (start.source, start.series, start.expected, start.detector.shape) == ("disk", "run.npy", 3, (5, 4))
    assert end == SeriesEnd("disk", "run.npy")
    stamped = [AsRead().decode(frame, 77.0)[0] for frame in frames if frame is not None]
    assert [(one.index, one.origin, one.received) for one in stamped if isinstance(one, Frame)] == [
        (0, 1, 77.0),
        (1, 3, 77.0),
        (2, 5, 77.0),
    ]
    assert AsRead().decode(start, 77.0)[0] == start
    assert source.receive(0.1) is None
    source.close()


def test_a_file_source_without_a_path_is_the_operators_fault() -> None:
    with pytest.raises(ConfigError, match=r"source\.path"):
        FileSource(SourceSettings(kind="file")).open()


GOLD = {"entry_1/instrument_1/source_1/energy": 710 * 1.602176634e-19, "detector/distance": 0.08}


def test_the_gold_ball_layout_is_read_as_photons_in_si_units(tmp_path: Path) -> None:
    dark = np.stack([np.full(SHAPE[1:], 2.0), np.full(SHAPE[1:], 3.0)])
    raw = FRAMES.copy()
    raw[1, 0, 0] = 65535
    lit = np.zeros(SHAPE[1:], np.uint32)
    lit[0, :3] = 0x1000, 0x1001, 0x800
    moved = np.column_stack([np.arange(6) * 1e-6, np.arange(6) * 2e-6, np.zeros(6)])
    more = GOLD | {"detector/data_dark": dark, "detector/mask": lit, "detector/basis_vectors": BASIS}
    path = cxi(tmp_path / "a.cxi", **more, **{"entry_1/sample_1/geometry_1/translation": moved})
    with h5py.File(path, "a") as file:
        file[f"{CXI}/data"][...] = raw
    recording = open_recording(path, "::2", skip=(2,))
    assert [recording.origin(i) for i in range(len(recording))] == [0, 4]
    assert recording.dtype == recording[0].dtype == np.float32
    np.testing.assert_array_equal(recording[0], np.maximum(FRAMES[0] - 2.5, 0))
    np.testing.assert_array_equal(recording[1], FRAMES[4] - 2.5)
    np.testing.assert_array_equal(np.isnan(open_recording(path)[1]), raw[1] == 65535)
    assert recording.position(1) == pytest.approx((-4e-6, -8e-6))
    detector = recording.detector()
    assert detector.mask is not None
    assert np.argwhere(detector.mask).tolist() == [[0, 1]]
    assert (detector.energy_ev, detector.pixel_m, detector.distance_m) == pytest.approx((710, 60e-6, 0.08))


BASIS = np.array([[0, -60e-6], [-60e-6, 0], [0, 0]])


@pytest.mark.parametrize("basis", [BASIS, BASIS.T])
@pytest.mark.parametrize("dark", [np.full(SHAPE[1:], 2, np.uint16), np.full((1, *SHAPE[1:]), 2.0)])
def test_basis_vectors_and_darks_come_either_way(basis: np.ndarray, dark: np.ndarray, tmp_path: Path) -> None:
    recording = open_recording(cxi(tmp_path / "a.cxi", **{"detector/basis_vectors": basis, "detector/data_dark": dark}))
    assert recording.detector().pixel_m == pytest.approx(60e-6)
    np.testing.assert_array_equal(recording[5], FRAMES[5] - np.float32(2))


def test_nexus_numbers_are_in_the_units_that_the_file_says(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "a.nxs", entry__instrument__detector__data=FRAMES)
    with h5py.File(path, "a") as file:
        for name, value, unit in [
            ("instrument/detector/distance", 700.0, "mm"),
            ("instrument/detector/x_pixel_size", 75.0, "um"),
            ("instrument/detector/count_time", 20.0, "ms"),
            ("instrument/beam/incident_beam_energy", 8.0, "keV"),
            ("sample/transformations/x", np.arange(6.0), "um"),
            ("sample/transformations/y", np.zeros(6), "um, as read"),
        ]:
            file[f"entry/{name}"] = value
            file[f"entry/{name}"].attrs["units"] = unit
    recording = open_recording(path)
    detector = recording.detector()
    assert (detector.distance_m, detector.pixel_m, detector.frame_time_s) == pytest.approx((0.7, 75e-6, 0.02))
    assert detector.energy_ev == pytest.approx(8000)
    assert recording.position(3) == pytest.approx((-3e-6, 0))


@pytest.mark.parametrize(
    ("name", "value", "unit", "energy_ev"),
    [
        ("entry/instrument/beam/incident_energy", 9000.0, None, 9000),
        ("entry/instrument/monochromator/energy", 1.602176634e-15, "J", 10_000),
        ("entry/instrument/beam/incident_wavelength", 1.239841984, None, 10_000),
        ("entry/instrument/beam/incident_wavelength", 0.1239841984, "nm", 10_000),
        ("entry/instrument/beam/incident_energy", 9000.0, "parsec", None),
        # NXcxi_ptycho keeps the storage ring's energy under source_1.
        ("entry_1/instrument_1/source_1/energy", 3.0e9 * 1.602176634e-19, None, None),
    ],
)
def test_the_photons_energy_is_found_or_said_to_be_unknown(
    name: str, value: float, unit: str | None, energy_ev: float | None, tmp_path: Path
) -> None:
    path = hdf5(tmp_path / "a.nxs", entry__data__data=FRAMES)
    with h5py.File(path, "a") as file:
        file[name] = value
        if unit is not None:
            file[name].attrs["units"] = unit
    found = open_recording(path).detector().energy_ev
    assert found == (None if energy_ev is None else pytest.approx(energy_ev))


@pytest.mark.parametrize("axes", ["lines", "points"])
def test_a_raster_scan_is_rolled_out_line_by_line(axes: str, tmp_path: Path) -> None:
    """NXcxi_ptycho: frames (lines, points, rows, columns), x and y a number a point or one each along their axis."""
    raster = FRAMES.reshape(2, 3, 5, 4)
    x, y = np.array([0.0, 1e-6, 2e-6]), np.array([5e-6, 6e-6])
    grid = np.meshgrid(x, y)
    path = hdf5(
        tmp_path / "a.nxs",
        entry_1__instrument_1__detector_1__data=raster,
        entry_1__data__x=x if axes == "lines" else grid[0],
        entry_1__data__y=y if axes == "lines" else grid[1],
    )
    recording = open_recording(path, "1:")
    assert recording.shape == (5, 5, 4)
    np.testing.assert_array_equal([recording[i] for i in range(5)], FRAMES[1:])
    np.testing.assert_allclose([recording.position(i) for i in (0, 2, 4)], [(-1e-6, -5e-6), (-0.0, -6e-6), (-2e-6, -6e-6)])


def edf(path: Path, *frames: np.ndarray) -> Path:
    from fabio.edfimage import EdfImage

    image = EdfImage(data=frames[0])
    for frame in frames[1:]:
        image.append_frame(data=frame)
    image.write(str(path))
    return path


def test_edf_and_tiff_files_and_folders_are_read_in_the_order_people_count(tmp_path: Path) -> None:
    pytest.importorskip("fabio")
    for folder in ("edf", "packed", "tif"):
        (tmp_path / folder).mkdir()
    for i, frame in enumerate(FRAMES):
        number = 2 * i + 1  # 1, 3, 5, 7, 9, 11
        edf(tmp_path / "edf" / f"img_{number}.edf", frame)
        edf(tmp_path / "packed" / f"img_{number}.edf.gz", frame)
        tifffile.imwrite(tmp_path / "tif" / f"img_{number}.TIFF", frame)
    several = edf(tmp_path / "several.edf", *FRAMES)
    single = edf(tmp_path / "single.edf", FRAMES[3])
    tifffile.imwrite(tmp_path / "pages.tif", FRAMES, photometric="minisblack", compression="zlib")
    tifffile.imwrite(tmp_path / "imagej.tif", FRAMES, imagej=True)
    tifffile.imwrite(tmp_path / "one.tif", FRAMES[3])
    for path in (*(tmp_path / name for name in ("edf", "packed", "tif", "pages.tif", "imagej.tif")), several):
        recording = open_recording(path)
        assert (recording.shape, recording.dtype.newbyteorder("=")) == (SHAPE, np.uint16), path
        np.testing.assert_array_equal([recording[i] for i in range(6)], FRAMES, err_msg=str(path))
    for path in (single, tmp_path / "one.tif"):
        np.testing.assert_array_equal(open_recording(path)[0], FRAMES[3])


def test_without_fabio_an_edf_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edf(tmp_path / "a.edf", FRAMES[0])
    monkeypatch.setitem(sys.modules, "fabio", None)
    with pytest.raises(ConfigError, match=r"pip install 'streamprior\[edf\]'"):
        open_recording(path)


def test_outliers_are_left_out_and_the_others_keep_their_place(tmp_path: Path) -> None:
    path = npy(tmp_path / "a.npy")
    recording = open_recording(path, skip=(4, 0))
    assert [recording.origin(i) for i in range(len(recording))] == [1, 2, 3, 5]
    np.testing.assert_array_equal(recording[3], FRAMES[5])
    source = FileSource(SourceSettings(kind="file", path=path, frames="::2", skip=(2, 3)))
    source.open()
    assert [(one.index, one.origin) for one in drained(source) if isinstance(one, Frame)] == [(0, 0), (1, 4)]
    with pytest.raises(ConfigError, match=r"source\.skip: 6 is no frame of .*a\.npy, which has 6"):
        open_recording(path, skip=(6,))
    with pytest.raises(ConfigError, match=r"source\.skip: leaves none of the frames ':2'"):
        open_recording(path, ":2", skip=(0, 1))


def drained(source: FileSource | GrowingFile) -> list[Message]:
    seen = []
    while not source.exhausted:
        message = source.receive(0.1)
        if message is not None:
            seen.append(message)
    return seen


def test_a_damaged_frame_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = tiffs(tmp_path / "scan")
    source = FileSource(SourceSettings(kind="file", path=folder))
    source.open()
    (folder / "scan_0002.tif").write_bytes(b"no image")
    tifffile.imwrite(folder / "scan_0003.tif", FRAMES[3][:2])
    (folder / "scan_0004.tif").unlink()
    start, *frames, end = drained(source)
    assert isinstance(start, SeriesStart)
    assert isinstance(end, SeriesEnd)
    assert [(one.index, one.origin) for one in frames if isinstance(one, Frame)] == [(0, 0), (1, 1), (5, 5)]
    sentences = []
    for one in frames:
        if isinstance(one, bytes):
            with pytest.raises(WireError) as told:
                AsRead().decode(one, 0.0)
            assert told.value.reason == "file_damaged"
            sentences.append(told.value.detail)
    assert len(sentences) == 3
    for number, (sentence, words) in enumerate(zip(sentences, ("scan_0002.tif", "(2, 4)", "scan_0004.tif"), strict=True)):
        assert f"frame {number + 2}" in sentence
        assert words in sentence


def test_of_a_file_with_damaged_frames_the_others_are_published_and_the_ledger_balances(tmp_path: Path) -> None:
    frames = diffraction(count=12)
    folder = tiffs(tmp_path / "scan", frames)
    source = FileSource(SourceSettings(kind="file", path=folder))
    source.open()
    for number in (3, 7):
        (folder / f"scan_{number:04d}.tif").write_bytes(b"no image")
    archive = Kept()
    house = House([], [archive])
    path = Pipeline(
        Wire(source, AsRead()),
        Joiner(PositionSettings(), separate=False),
        Runs(house.ledger.distinct, late_s=0.1, idle_s=60),
        ThreadCrew(house.recipe.stages, house.prior, 2, 4, 1.0, 2**20, house.meters.stage),
        house.recipe.watches(),
        [Outbox(archive, 2**20, house.ledger, house.meters)],
        house.ledger,
        house.meters,
        2**20,
        keep=lambda message, error: house.quarantined.append(error.reason),
    )
    path.start()
    assert path.join(60)
    assert path.failure is None
    assert sorted(result.index for result in archive.results) == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert house.quarantined == ["file_damaged"] * 2
    assert house.ledger.is_balanced()


def test_a_frame_whose_chunk_is_damaged_is_told_with_its_file(tmp_path: Path) -> None:
    path = compressed(tmp_path / "a.h5")
    with h5py.File(path) as file:
        chunk = file["entry/data/data"].id.get_chunk_info(2)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * chunk.size)
    recording = open_recording(path)
    np.testing.assert_array_equal(recording[3], FRAMES[3])
    with pytest.raises(FrameDamaged, match=r"a\.h5: frame 2 cannot be read"):
        recording[2]


WRITER = """
import sys, h5py, numpy as np
path, whole = sys.argv[1], sys.argv[2] == "whole"
sys.stdin.readline()
file = h5py.File(path, "w", libver="latest")
data = file.create_dataset("entry/data/data", (6 if whole else 0, 5, 4), "u2", maxshape=(None, 5, 4), chunks=(1, 5, 4))
print("made", flush=True)
sys.stdin.readline()
file.swmr_mode = True
print("open to readers", flush=True)
for line in sys.stdin:
    number = int(line)
    if number >= len(data):
        data.resize(number + 1, axis=0)
    data[number] = np.arange(20).reshape(5, 4) + 20 * number
    data.flush()
    print(number, flush=True)
"""


@contextmanager
def writer(path: Path, kind: str) -> Iterator[Callable[[object], None]]:
    """Another process that writes an HDF5 file step by step; what it is told is done when the call returns."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None

    def tell(what: object) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        print(what, file=process.stdin, flush=True)
        assert process.stdout.readline()

    try:
        yield tell
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def followed(path: Path, **more: Any) -> tuple[GrowingFile, Clock]:
    clock = Clock()
    source = GrowingFile(SourceSettings(kind="file", name="disk", path=path, follow_s=10, **more), clock)
    source.open()
    return source, clock


@pytest.mark.parametrize("kind", ["growing", "whole"])
def test_a_file_is_followed_while_another_process_writes_it(kind: str, tmp_path: Path) -> None:
    """Made longer frame by frame, or made whole at the start and filled."""
    path = tmp_path / "scan.h5"
    source, clock = followed(path)
    with writer(path, kind) as tell:
        assert source.receive(0) is None  # not there
        tell("make")
        assert source.receive(0) is None  # there, and locked by its writer
        tell("open")
        start = source.receive(0)
        assert start == SeriesStart("disk", "scan.h5", None, Detector(shape=(5, 4)), {"file": "scan.h5", "title": ""})
        for number in range(3):
            assert source.receive(0) is None
            tell(number)
            clock.now += 9  # a pause that is short enough
            frame = source.receive(0)
            assert isinstance(frame, Frame)
            assert (frame.index, frame.origin, frame.series) == (number, number, "scan.h5")
            np.testing.assert_array_equal(frame.counts, FRAMES[number])
        clock.now += 9
        assert source.receive(0) is None
        clock.now += 2
        assert source.receive(0) == SeriesEnd("disk", "scan.h5")
        assert source.exhausted
        source.close()


def test_a_frame_that_was_never_written_is_told_and_those_after_it_are_read(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    source, clock = followed(path, skip=(4,))
    with writer(path, "whole") as tell:
        for step in ("make", "open", 0, 3, 4, 5):
            tell(step)
        assert isinstance(source.receive(0), SeriesStart)
        assert getattr(source.receive(0), "origin", None) == 0
        assert source.receive(0) is None
        clock.now += 11
        assert [source.receive(0) for _ in range(2)] == [f"{path}: frame {number} was never written".encode() for number in (1, 2)]
        assert [getattr(source.receive(0), "origin", None) for _ in range(2)] == [3, 5]
        assert source.receive(0) is None
        clock.now += 11
        assert isinstance(source.receive(0), SeriesEnd)
        source.close()


def test_of_a_file_that_is_followed_a_slice_without_its_end_is_read(tmp_path: Path) -> None:
    source, _ = followed(compressed(tmp_path / "a.h5"), frames="1:4:2")
    start, *frames = [source.receive(0) for _ in range(3)]
    assert isinstance(start, SeriesStart)
    assert [(one.index, one.origin) for one in frames if isinstance(one, Frame)] == [(0, 1), (1, 3)]
    assert isinstance(source.receive(0), SeriesEnd)
    for frames_setting in ("-3:", "::-1", "2"):
        with pytest.raises(ConfigError, match="needs an end, which the file has not yet"):
            followed(tmp_path / "a.h5", frames=frames_setting)
    with pytest.raises(ConfigError, match="no HDF5 file to be"):
        followed(tmp_path)


def test_a_file_that_never_comes_ends_the_waiting(tmp_path: Path) -> None:
    source, clock = followed(tmp_path / "never.h5")
    clock.now = 9
    assert source.receive(0) is None
    assert not source.exhausted
    clock.now = 11
    assert source.receive(0) is None
    assert source.exhausted
    source.close()


def test_the_settings_say_whether_a_file_is_followed(tmp_path: Path) -> None:
    assert isinstance(file_source(SourceSettings(kind="file", path=tmp_path / "a.h5", follow_s=1)), GrowingFile)
    assert isinstance(file_source(SourceSettings(kind="file", path=tmp_path / "a.h5")), FileSource)


def test_the_measured_rocking_curve(data_folder: Path) -> None:
    recording = open_recording(data_folder / "bcdi_gold_rocking_curve.cxi", "1::2")
    assert recording.shape == (100, 256, 256)
    assert recording.dtype == np.int32
    detector = recording.detector()
    assert detector.energy_ev == pytest.approx(9000, rel=1e-3)
    assert detector.distance_m == pytest.approx(0.5)
    assert detector.pixel_m == pytest.approx(55e-6)
    assert recording.frame(50).max() > 10_000


@pytest.mark.parametrize("kind", ["npy", "tiff"])
def test_a_file_that_is_cut_off_while_it_is_read_costs_its_frames_and_not_the_process(kind: str, tmp_path: Path) -> None:
    """A mapped file would end the process with a bus error; so it is read in one of its own."""
    path = tmp_path / f"scan.{kind}"
    stack = np.ones((400, 32, 32), np.uint16)
    if kind == "npy":
        np.save(path, stack)
    else:
        tifffile.imwrite(path, stack, imagej=True, truncate=True)
    reader = (
        "import os, sys\n"
        "from streamprior.sources.files import open_recording\n"
        "from streamprior.sources.recording import FrameDamaged\n"
        "recording = open_recording(sys.argv[1])\n"
        "print(int(recording[399].sum()))\n"
        "os.truncate(sys.argv[1], 20_000)\n"
        "print(int(recording[3].sum()))\n"
        "try:\n    recording[399].sum()\n"
        "except FrameDamaged as damage:\n    print(damage)\n"
    )
    done = subprocess.run([sys.executable, "-c", reader, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    whole, before, after = done.stdout.splitlines()
    assert (whole, before) == ("1024", "1024")
    assert "frame 399 cannot be read (the file has become shorter)" in after


def test_a_file_that_is_written_over_while_it_is_followed_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    source, _ = followed(path)
    with writer(path, "growing") as tell:
        tell("make")
        tell("open")
        tell(0)
        assert isinstance(source.receive(0), SeriesStart)
        assert isinstance(source.receive(0), Frame)
    path.write_bytes(b"something else " * 1000)
    with structlog.testing.capture_logs() as said:
        assert isinstance(source.receive(0), SeriesEnd)
    assert said[0]["event"] == "the file that was followed is another one now"
    assert source.exhausted
    source.close()
