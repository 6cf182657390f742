"""Recorded runs: every format gives the frames that were written, in the order asked for, with what the file says of the detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
import tifffile

from streamprior.config import SourceSettings
from streamprior.errors import ConfigError
from streamprior.records import Frame, SeriesEnd, SeriesStart
from streamprior.sources.files import AsRead, FileSource, open_recording

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
    whole = cxi(tmp_path / "whole.cxi").read_bytes()
    (tmp_path / "cut.cxi").write_bytes(whole[: len(whole) // 2])
    for name, words in {
        "missing.cxi": "no such file",
        "text.txt": "neither HDF5",
        "empty": "without TIFF files",
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


def test_the_measured_rocking_curve(data_folder: Path) -> None:
    recording = open_recording(data_folder / "bcdi_gold_rocking_curve.cxi", "1::2")
    assert recording.shape == (100, 256, 256)
    assert recording.dtype == np.int32
    detector = recording.detector()
    assert detector.energy_ev == pytest.approx(9000, rel=1e-3)
    assert detector.distance_m == pytest.approx(0.5)
    assert detector.pixel_m == pytest.approx(55e-6)
    assert recording.frame(50).max() > 10_000
