"""References to files: pixels as the Bluesky family's own readers give them, and never a byte from outside the listed folders."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprior.errors import WireError
from streamprior.sources.assets import Assets, Awaited, Stack, path_of_uri, resource_stack, stream_stack

DATASET = "/entry/data/data"

# The readers of others that pixels are compared with leave their files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def truth(count: int = 6, shape: tuple[int, int] = (13, 17), dtype: str = "u2") -> np.ndarray:
    return np.random.default_rng(1).poisson(3, (count, *shape)).astype(dtype)


def write(path: Path, name: str = DATASET, data: np.ndarray | None = None, **more: Any) -> Path:
    with h5py.File(path, "a") as file:
        file.create_dataset(name, data=truth() if data is None else data, **more)
    return path


@pytest.fixture
def reader() -> Iterator[Callable[..., Assets]]:
    """Makes readers of folders, and closes their files."""
    made: list[Assets] = []

    def make(*folders: Path, **more: Any) -> Assets:
        made.append(Assets(folders, more.pop("moved", {}), **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


Reader = Callable[..., Assets]


def hdf5(path: Path | str, dataset: str = DATASET, **more: Any) -> Stack:
    return Stack("hdf5", str(path), dataset=dataset, **more)


def refused(assets: Assets, stack: Stack, row: int = 0) -> str:
    with pytest.raises(WireError) as error:
        assets.frame(stack, row)
    return error.value.reason


def stream(path: Path | str, mimetype: str = "application/x-hdf5", **parameters: Any) -> dict[str, Any]:
    return {"uid": "r", "data_key": "det", "uri": f"file://localhost{path}", "mimetype": mimetype, "parameters": parameters}


def consolidated(resource: dict[str, Any], shape: list[int], events: int, dtype: str = "<u2") -> np.ndarray:
    """What Bluesky's own consolidator and Tiled's adapter make of the same documents."""
    from bluesky_tiled_plugins.writing.consolidators import consolidator_factory

    descriptor = {"data_keys": {"det": {"shape": shape, "dtype": "array", "dtype_numpy": dtype, "source": "x"}}}
    copy = {**resource, "parameters": dict(resource["parameters"])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # joining by concatenation is deprecated there, and in use
        found = consolidator_factory(copy, descriptor)
        found.consume_stream_datum({"indices": {"start": 0, "stop": events}, "seq_nums": {"start": 1, "stop": events + 1}})
        return np.asarray(found.init_adapter().read())


@pytest.mark.parametrize(
    ("shape", "stored", "parameters"),
    [
        ([13, 17], (6, 13, 17), {"chunk_shape": (1, 13, 17)}),
        ([1, 13, 17], (6, 1, 13, 17), {"chunk_shape": (1,)}),
        ([1, 13, 17], (6, 13, 17), {"chunk_shape": (100, 13, 17), "join_method": "concat"}),
        ([2, 13, 17], (6, 13, 17), {"chunk_shape": (2, 13, 17), "join_method": "concat"}),
        ([2, 13, 17], (3, 2, 13, 17), {"chunk_shape": (1,)}),
        ([13, 17], (78, 17), {"chunk_shape": (13,), "join_method": "concat"}),
    ],
)
def test_hdf5_frames_are_those_of_the_consolidator(
    tmp_path: Path, reader: Reader, shape: list[int], stored: tuple[int, ...], parameters: dict
) -> None:
    frames = truth()
    path = write(tmp_path / "a.h5", data=frames.reshape(stored))
    resource = stream(path, dataset=DATASET, **parameters)
    stack = stream_stack(resource, shape)
    assets = reader(tmp_path)
    mine = np.array([assets.frame(stack, row) for row in range(6)])
    np.testing.assert_array_equal(mine, frames)
    np.testing.assert_array_equal(mine, consolidated(resource, shape, 6 // stack.per_event).reshape(mine.shape))


@pytest.mark.parametrize(
    ("shape", "pages", "parameters"),
    [
        ([13, 17], 1, {"template": "img_{:05d}.tif"}),
        ([1, 13, 17], 1, {"template": "img_{:05d}.tif", "chunk_shape": (1, 13, 17), "join_method": "concat"}),
        ([2, 13, 17], 1, {"template": "%s%s_%6.6d.tif", "filename": "img", "multiplier": 2}),
        ([2, 13, 17], 2, {"template": "/img_%d.tif", "chunk_shape": (2, 13, 17)}),
        ([6, 13, 17], 2, {"template": "img_%3d.tif", "chunk_shape": (2, 13, 17)}),
        ([6, 13, 17], 3, {"template": "img_%03d.tif", "files_per_datum": 2, "chunk_shape": (1,)}),
    ],
)
def test_tiff_frames_are_those_of_the_consolidator(tmp_path: Path, reader: Reader, shape: list[int], pages: int, parameters: dict) -> None:
    frames = truth()
    resource = stream(f"{tmp_path}/", "multipart/related;type=image/tiff", **parameters)
    stack = stream_stack(resource, shape)
    for number in range(6 // pages):
        tifffile.imwrite(stack.place(number * pages)[0], frames[number * pages : (number + 1) * pages].squeeze(), photometric="minisblack")
    assets = reader(tmp_path)
    mine = np.array([assets.frame(stack, row) for row in range(6)])
    np.testing.assert_array_equal(mine, frames)
    assert stack.per_file == pages
    np.testing.assert_array_equal(mine, consolidated(resource, shape, 6 // stack.per_event).reshape(mine.shape))


@pytest.mark.parametrize("shape", [[13, 17], [2, 13, 17]])
def test_npy_frames_are_those_of_the_consolidator(tmp_path: Path, reader: Reader, shape: list[int]) -> None:
    frames = truth()
    resource = stream(tmp_path / "cam", "multipart/related;type=application/x-npy")
    for number, event in enumerate(frames.reshape(-1, *shape)):
        np.save(tmp_path / f"cam_{number}.npy", event)
    stack = stream_stack(resource, shape)
    assets = reader(tmp_path)
    mine = np.array([assets.frame(stack, row) for row in range(6)])
    np.testing.assert_array_equal(mine, frames)
    np.testing.assert_array_equal(mine, consolidated(resource, shape, 6 // stack.per_event).reshape(mine.shape))


@pytest.mark.parametrize("spec", ["AD_HDF5", "AD_HDF5_SWMR", "AD_HDF5_SINGLE", "AD_TIFF", "NPY_SEQ"])
def test_frames_of_old_resources_are_those_of_the_area_detector_handlers(tmp_path: Path, reader: Reader, spec: str) -> None:
    from area_detector_handlers import handlers
    from ophyd.sim import NumpySeqHandler

    frames = truth()
    kwargs: dict[str, Any] = {"frame_per_point": 2}
    point = "point_number"
    if spec in ("AD_HDF5", "AD_HDF5_SWMR"):
        path = write(tmp_path / "a.h5", data=frames)
        # Its SWMR twin fails at its second frame.
        handler = handlers.AreaDetectorHDF5Handler(path, **kwargs)
    elif spec == "NPY_SEQ":
        path, kwargs, point = tmp_path / "cam", {}, "index"
        for number in range(3):
            np.save(tmp_path / f"cam_{number}.npy", frames[2 * number : 2 * number + 2])
        handler = NumpySeqHandler("cam", str(tmp_path))
    else:
        path, kwargs = tmp_path, kwargs | {"template": "%s%s_%6.6d.dat", "filename": "cam"}
        for number, frame in enumerate(frames):
            name = tmp_path / f"cam_{number:06d}.dat"
            write(name, data=frame) if "HDF5" in spec else tifffile.imwrite(name, frame)
        handler = (handlers.AreaDetectorHDF5SingleHandler if "HDF5" in spec else handlers.AreaDetectorTiffHandler)(str(path), **kwargs)
    resource = {
        "spec": spec,
        "root": str(tmp_path.parent),
        "resource_path": f"/{tmp_path.name}/{path.name}" if path != tmp_path else tmp_path.name,
    }
    assets = reader(tmp_path)
    for number in range(3):
        stack, first = resource_stack(resource | {"resource_kwargs": kwargs}, {point: number}, [2, 13, 17])
        assert stack.per_event == 2
        mine = np.array([assets.frame(stack, first + k) for k in range(2)])
        np.testing.assert_array_equal(mine, np.asarray(handler(**{point: number})))
        np.testing.assert_array_equal(mine, frames[2 * number : 2 * number + 2])


def test_compressed_chunks_of_many_frames_are_read(tmp_path: Path, reader: Reader) -> None:
    frames = truth(40, dtype="u4")
    path = write(tmp_path / "a.h5", data=frames, chunks=(10, 13, 17), **hdf5plugin.Bitshuffle(cname="lz4"))
    assets = reader(tmp_path)
    np.testing.assert_array_equal([assets.frame(hdf5(path), row) for row in range(40)], frames)


@pytest.mark.parametrize(
    "name", ["{outside}/a.h5", "{inside}/../outside/a.h5", "{inside}/link/a.h5", "{inside}/link.h5", "/etc/passwd", "a.h5"]
)
def test_what_lies_outside_the_folders_is_never_opened(tmp_path: Path, reader: Reader, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    write(outside / "a.h5")
    (inside / "link").symlink_to(outside)
    (inside / "link.h5").symlink_to(outside / "a.h5")
    monkeypatch.chdir(outside)
    assert refused(reader(inside), hdf5(name.format(inside=inside, outside=outside))) == "outside_folder"
    assert refused(reader(), hdf5(outside / "a.h5")) == "outside_folder"
    # The neighbour whose name begins like the folder's is outside, too.
    (tmp_path / "inside2").mkdir()
    assert refused(reader(inside), hdf5(write(tmp_path / "inside2" / "a.h5"))) == "outside_folder"


def test_a_resource_path_cannot_climb_out_of_its_root(tmp_path: Path, reader: Reader) -> None:
    resource = {"spec": "AD_HDF5", "root": str(tmp_path), "resource_path": "../../../../../../../../etc/passwd", "resource_kwargs": {}}
    stack, _ = resource_stack(resource, {"point_number": 0}, [13, 17])
    assert refused(reader(tmp_path), stack) == "outside_folder"
    stack, _ = resource_stack(resource | {"root": "", "resource_path": "/etc/passwd"}, {}, [13, 17])
    assert refused(reader(tmp_path), stack) == "outside_folder"


def test_hdf5_is_not_left_to_follow_links_out_of_the_folder(tmp_path: Path, reader: Reader) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    write(outside / "a.h5")
    (outside / "raw").write_bytes(truth().tobytes())
    layout = h5py.VirtualLayout((6, 13, 17), "u2")
    layout[:] = h5py.VirtualSource(str(outside / "a.h5"), DATASET, (6, 13, 17))
    with h5py.File(inside / "b.h5", "w") as file:
        file["absolute"] = h5py.ExternalLink(str(outside / "a.h5"), DATASET)
        file["relative"] = h5py.ExternalLink("../outside/a.h5", DATASET)
        file["group"] = h5py.ExternalLink("../outside/a.h5", "/entry")
        file["soft"] = h5py.SoftLink("/absolute")
        file["loop"] = h5py.SoftLink("/loop")
        file["self"] = h5py.ExternalLink("b.h5", "/self")
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("raw", (6, 13, 17), "u2", external=[(str(outside / "raw"), 0, h5py.h5f.UNLIMITED)])
    # A virtual dataset within the folder, of one that leads out of it.
    nested = h5py.VirtualLayout((6, 13, 17), "u2")
    nested[:] = h5py.VirtualSource("b.h5", "virtual", (6, 13, 17))
    with h5py.File(inside / "c.h5", "w") as file:
        file.create_virtual_dataset("nested", nested)
    assets = reader(inside)
    for name in ("absolute", "relative", "soft", "virtual", "raw"):
        assert refused(assets, hdf5(inside / "b.h5", name)) == "outside_folder", name
    assert refused(assets, hdf5(inside / "b.h5", "group/data/data")) == "outside_folder"
    assert refused(assets, hdf5(inside / "c.h5", "nested")) == "outside_folder"
    assert refused(assets, hdf5(inside / "b.h5", "loop")) == "no_reader"
    assert refused(assets, hdf5(inside / "b.h5", "self")) == "no_reader"


def test_links_and_virtual_datasets_within_the_folders_are_followed(tmp_path: Path, reader: Reader) -> None:
    """As EIGER's master files and Odin's are."""
    frames = truth()
    (tmp_path / "data").mkdir()
    layout = h5py.VirtualLayout((6, 13, 17), "u2")
    for part in range(3):
        write(tmp_path / "data" / f"{part}.h5", data=frames[part::3])
        layout[part::3] = h5py.VirtualSource(f"data/{part}.h5", DATASET, (2, 13, 17))
    with h5py.File(tmp_path / "master.h5", "w") as file:
        file["entry/one"] = h5py.ExternalLink("data/1.h5", DATASET)
        file["entry/two"] = h5py.SoftLink("one")
        file.create_virtual_dataset("entry/all", layout)
    assets = reader(tmp_path)
    for turn in range(2):
        np.testing.assert_array_equal(assets.frame(hdf5(tmp_path / "master.h5", "/entry/two"), turn), frames[1::3][turn])
        for row in range(6):
            np.testing.assert_array_equal(assets.frame(hdf5(tmp_path / "master.h5", "/entry/all"), row), frames[row])
    (tmp_path / "data" / "2.h5").unlink()
    assert refused(reader(tmp_path), hdf5(tmp_path / "master.h5", "/entry/all")) == "file_absent"


def test_frames_that_are_not_written_yet_are_awaited_and_then_read(tmp_path: Path, reader: Reader) -> None:
    frames, path, assets = truth(), tmp_path / "a.h5", reader(tmp_path)

    def awaited(row: int) -> None:
        with pytest.raises(Awaited, match="file_absent"):
            assets.frame(hdf5(path, "d"), row)

    awaited(0)
    with h5py.File(path, "w", libver="latest") as file:
        dataset = file.create_dataset("d", (0, 13, 17), "u2", maxshape=(None, 13, 17), chunks=(1, 13, 17))
        file.swmr_mode = True
        awaited(0)
        for row, frame in enumerate(frames):
            # As long as the scan before its frames: HDF5 itself would give zeros.
            dataset.resize(row + 3, 0)
            dataset.flush()
            awaited(row)
            dataset[row] = frame
            dataset.flush()
            np.testing.assert_array_equal(assets.frame(hdf5(path, "d"), row), frame)
            awaited(row + 1)


def test_a_file_that_takes_the_name_of_another_is_read_anew(tmp_path: Path, reader: Reader) -> None:
    frames, path, assets = truth(), tmp_path / "a.h5", reader(tmp_path)
    write(path, data=frames)
    np.testing.assert_array_equal(assets.frame(hdf5(path), 0), frames[0])
    write(tmp_path / "b.h5", data=frames[::-1])
    os.replace(tmp_path / "b.h5", path)
    np.testing.assert_array_equal(assets.frame(hdf5(path), 0), frames[-1])


def test_few_files_stay_open(tmp_path: Path, reader: Reader) -> None:
    assets = reader(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for i in range(30):
        tifffile.imwrite(tmp_path / f"{i}.tif", truth()[0])
        assets.frame(Stack("tiff", str(tmp_path / f"{i}.tif")), 0)
    assert len(os.listdir("/proc/self/fd")) - before <= 8
    assets.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_damaged_files_are_refused_with_their_reason(tmp_path: Path, reader: Reader) -> None:
    frames = truth()
    assets = reader(tmp_path)
    whole = write(tmp_path / "a.h5", data=frames, chunks=(1, 13, 17), compression="gzip").read_bytes()
    (tmp_path / "short.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.h5").write_bytes(os.urandom(5000))
    (tmp_path / "empty.h5").write_bytes(b"")
    for name in ("short.h5", "noise.h5", "empty.h5"):
        assert refused(assets, hdf5(tmp_path / name)) == "file_damaged"
    tifffile.imwrite(tmp_path / "a.tif", frames[0])
    whole = (tmp_path / "a.tif").read_bytes()
    for size in (0, 4, 100, len(whole) - 10):
        (tmp_path / "short.tif").write_bytes(whole[:size])
        assert refused(assets, Stack("tiff", str(tmp_path / "short.tif"))) == "file_damaged", size
    np.save(tmp_path / "a.npy", frames)
    whole = (tmp_path / "a.npy").read_bytes()
    for size in (0, 8, 60, 200):
        (tmp_path / "short.npy").write_bytes(whole[:size])
        assert refused(assets, Stack("npy", str(tmp_path / "short.npy"))) == "file_damaged", size
    os.mkfifo(tmp_path / "pipe.npy")
    for kind in ("npy", "tiff", "hdf5"):
        assert refused(assets, Stack(kind, str(tmp_path / "pipe.npy"), dataset="x")) == "no_reader"


def test_sizes_are_checked_before_pixels_are_read(tmp_path: Path, reader: Reader) -> None:
    assets = reader(tmp_path, most_bytes=10_000)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("huge", (10, 100_000, 100_000), "u4", chunks=(1, 10, 10))
        file.create_dataset("chunk", (1000, 10, 10), "u2", chunks=(1000, 10, 10), data=np.zeros((1000, 10, 10)))
        file.create_dataset("text", data=[["a", "b"], ["c", "d"]], dtype=h5py.string_dtype())
        file.create_dataset("pairs", (3, 4, 4), np.dtype([("a", "u2"), ("b", "f4")]))
        file.create_dataset("line", (7,), "u2")
    for name, reason in (
        ("huge", "too_large"),
        ("chunk", "too_large"),
        ("text", "wrong_dtype"),
        ("pairs", "wrong_dtype"),
        ("line", "wrong_shape"),
    ):
        assert refused(assets, hdf5(tmp_path / "a.h5", name)) == reason
    header = b"{'descr': '<u4', 'fortran_order': False, 'shape': (100000, 100000), }"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 100)
    assert refused(assets, Stack("npy", str(tmp_path / "a.npy"))) == "too_large"
    np.save(tmp_path / "o.npy", np.array([[{}]]), allow_pickle=True)
    assert refused(assets, Stack("npy", str(tmp_path / "o.npy"))) == "wrong_dtype"
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((200, 200), "u2"))
    assert refused(assets, Stack("tiff", str(tmp_path / "a.tif"))) == "too_large"
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((20, 20, 3), "u1"), photometric="rgb")
    assert refused(assets, Stack("tiff", str(tmp_path / "rgb.tif"))) == "wrong_shape"


@pytest.mark.parametrize(
    "template", ["%1000000000d.tif", "{:1000000000d}", "{0.__class__}", "{}{}", "no number", "%s", "%n%d", 7, None, "x" * 5000 + "%d"]
)
def test_a_template_is_a_name_with_one_number_and_nothing_else(template: Any) -> None:
    resource = stream("/data/", "multipart/related;type=image/tiff", template=template)
    if template == "%n%d":
        assert stream_stack(resource, [13, 17]).place(3) == ("/data/%n3", 0)
        return
    with pytest.raises(WireError, match=r"no_reader|bad_document"):
        stream_stack(resource, [13, 17])


def test_folders_that_are_elsewhere_here_are_found_by_the_longest_name(tmp_path: Path, reader: Reader) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.h5")
    moved = {"/ioc": tmp_path / "one", "/ioc/deep": tmp_path / "two", "Z:\\data": tmp_path / "one"}
    assets = reader(tmp_path, moved=moved)
    assert assets.resolve("/ioc/a.h5") == str(tmp_path.resolve() / "one" / "a.h5")
    assert assets.resolve("/ioc/deep/a.h5") == str(tmp_path.resolve() / "two" / "a.h5")
    assert assets.resolve(path_of_uri("file://localhost/Z:/data/a.h5")) == str(tmp_path.resolve() / "one" / "a.h5")
    stack, _ = resource_stack({"spec": "AD_HDF5", "root": "Z:\\data", "resource_path": "a.h5"}, {}, [13, 17])
    assert assets.frame(stack, 0).shape == (13, 17)
    for name in ("/ioc/../../etc/passwd", "/iocs/a.h5"):
        with pytest.raises(WireError, match="outside_folder"):
            assets.resolve(name)


@pytest.mark.parametrize("uri", ["https://host/a.h5", "file://elsewhere/a.h5", "s3://bucket/a", "/data/a.h5", "file://[", None, 3, ""])
def test_what_is_no_file_of_this_machine_has_no_reader(uri: Any) -> None:
    with pytest.raises(WireError, match=r"no_reader|bad_document"):
        path_of_uri(uri)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bytes_of_a_file_raise_nothing_but_wire_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flipped", numbered=True)
    kind = data.draw(st.sampled_from(["hdf5", "tiff", "npy"]))
    path = folder / "a"
    frames = truth(2)
    if kind == "hdf5":
        write(path, "d", frames, chunks=(1, 13, 17), compression="gzip")
    elif kind == "tiff":
        tifffile.imwrite(path, frames, compression=data.draw(st.sampled_from([None, "zlib"])))
    else:
        np.save(folder / "a.npy", frames)
        (folder / "a.npy").rename(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    assets = Assets([folder], {})
    for row in range(2):
        with contextlib.suppress(WireError):
            assert assets.frame(Stack(kind, str(path), dataset="d"), row).ndim == 2
    assets.close()
