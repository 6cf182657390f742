"""The image of the sample as a NeXus file: it comes back whole, follows the conventions of viewers, and survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from streamprior.errors import ConfigError
from streamprior.records import MosaicFrames, MosaicImage, Place
from streamprior.sinks.mosaic_file import MOSAIC_FILE, read_mosaic, summary, write_mosaic

ABOUT = {"title": "gold stars", "opened": 1_700_000_000.0, "provenance": {"version": "9.9"}}


def make_image(shape: tuple[int, int] = (40, 30), seed: int = 0, **changes: Any) -> MosaicImage:
    """A plausible image with a dark rim two pixels wide, five frames in and three left out."""
    random = np.random.default_rng(seed)
    light = random.uniform(1, 100, shape).astype(np.float32)
    light[:2] = 0
    frames = MosaicFrames(
        index=np.arange(8),
        position=np.where(np.arange(8)[:, None] == 3, np.nan, random.uniform(0, 1e-6, (8, 2))),
        place=np.array([0, 0, 0, Place.NO_POSITION, 0, 0, Place.OUTLIER, Place.OUTLIER], np.uint8),
        before=random.random(8, np.float32),
        after=random.random(8, np.float32),
        overlap=random.random(8, np.float32),
    )
    image = MosaicImage(
        run="uid-0001-abcdef",
        serial=1,
        final=False,
        object=(random.uniform(0.5, 1, shape) * np.exp(1j * random.uniform(-3, 3, shape))).astype(np.complex64),
        light=light,
        uncertainty=random.random(shape, np.float32),
        probe=(random.random((2, 16, 12)) + 1j).astype(np.complex64),
        unit="m",
        pixel=(2e-8, 3e-8),
        origin=(-1e-6, 5e-6),
        frequency=np.linspace(0, 0.5, 20, dtype=np.float32),
        correlation=random.random(20, np.float32),
        threshold=random.random(20, np.float32),
        resolution=4.5e-8,
        disagreement=0.1,
        chi2=float("nan"),
        passes=12,
        frames=frames,
        warnings=("positions came late", "the probe fits badly: 60 µm off"),
    )
    return replace(image, **changes)


def check_equal(first: MosaicImage, second: MosaicImage) -> None:
    for name in [field.name for field in fields(MosaicImage) if field.name != "frames"]:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    for field in fields(MosaicFrames):
        np.testing.assert_array_equal(getattr(first.frames, field.name), getattr(second.frames, field.name), err_msg=field.name)
    assert first.object.dtype == second.object.dtype


NOTHING = np.empty(0, np.float32)
NO_FRAMES = MosaicFrames(np.empty(0, np.int64), np.empty((0, 2)), np.empty(0, np.uint8), NOTHING, NOTHING, NOTHING)
NO_RINGS = dict.fromkeys(("frequency", "correlation", "threshold"), NOTHING)


@pytest.mark.parametrize(
    "changes",
    [{}, {"unit": "px", "pixel": (1.0, 1.0), "final": True}, {"warnings": (), "frames": NO_FRAMES, "resolution": float("nan"), **NO_RINGS}],
)
def test_an_image_comes_back_as_it_was_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    image = make_image(**changes)
    write_mosaic(image, tmp_path / MOSAIC_FILE, ABOUT)
    check_equal(read_mosaic(tmp_path / MOSAIC_FILE), image)


def default_plot(file: h5py.File) -> h5py.Group:
    """Where a NeXus viewer lands: the chain of @default from the root to an NXdata."""
    group = file
    while group.attrs["NX_class"] != "NXdata":
        group = group[group.attrs["default"]]
    return group


def test_a_viewer_finds_its_way_from_the_root_to_the_phase_on_the_sample(tmp_path: Path) -> None:
    image = make_image()
    write_mosaic(image, tmp_path / MOSAIC_FILE, ABOUT)
    with h5py.File(tmp_path / MOSAIC_FILE) as file:
        assert file.attrs["NX_class"] == "NXroot"
        plot = default_plot(file)
        phase = plot[plot.attrs["signal"]]
        np.testing.assert_allclose(phase, np.angle(image.object))
        assert (phase.attrs["units"], phase.dtype) == ("rad", np.float32)
        assert list(plot.attrs["axes"]) == ["y", "x"]
        np.testing.assert_allclose(plot["y"], -1e-6 + 2e-8 * np.arange(40))
        np.testing.assert_allclose(plot["x"], 5e-6 + 3e-8 * np.arange(30))
        assert plot["x"].attrs["units"] == "m"
        assert plot["light"].attrs["units"] == "photons"
        np.testing.assert_allclose(plot["amplitude"], np.abs(image.object))


def test_every_plot_of_the_file_has_the_signal_and_the_axes_it_names(tmp_path: Path) -> None:
    write_mosaic(make_image(), tmp_path / MOSAIC_FILE, ABOUT)
    plots: dict[str, tuple[int, ...]] = {}

    def check(name: str, group: Any) -> None:
        if group.attrs.get("NX_class") != "NXdata":
            return
        signal = group[group.attrs["signal"]]
        assert [len(group[axis]) for axis in group.attrs["axes"]] == list(signal.shape), name
        for other in group.attrs.get("auxiliary_signals", ()):
            assert group[other].shape == signal.shape, name
        plots[name] = signal.shape

    with h5py.File(tmp_path / MOSAIC_FILE) as file:
        file.visititems(check)
        frames = file["entry/frames"]
        assert [frames["place"].attrs["names"][place] for place in frames["place"][[0, 3, 7]]] == ["in", "no_position", "outlier"]
        assert file["entry/frc/frequency"].attrs["units"] == "1/m"
        assert json.loads(file["entry/run/data"].asstr()[()]) == ABOUT
        assert file["entry/title"].asstr()[()] == "gold stars"
    assert plots == {"entry/mosaic": (40, 30), "entry/probe": (2, 16, 12), "entry/frames": (8,), "entry/frc": (20,)}


def test_without_a_geometry_lengths_are_pixels(tmp_path: Path) -> None:
    write_mosaic(make_image(unit="px", pixel=(1.0, 1.0), origin=(3.0, 4.0)), tmp_path / MOSAIC_FILE, {})
    with h5py.File(tmp_path / MOSAIC_FILE) as file:
        assert file["entry/mosaic/y"].attrs["units"] == "pixel"
        assert file["entry/frc/frequency"].attrs["units"] == "1/pixel"
        assert file["entry/frc/frequency"][-1] == 0.5


def test_the_summary_counts_frames_by_what_became_of_them_and_is_plain_json() -> None:
    told = summary(make_image(final=True))
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["frames_in"] == 5
    assert told["left_out"] == {"no_position": 1, "outside": 0, "no_beam": 0, "outlier": 2}
    assert (told["shape"], told["final"], told["chi2"], told["resolution"]) == ([40, 30], True, None, 4.5e-8)


@pytest.mark.parametrize("content", [None, b"not HDF5"])
def test_what_is_no_mosaic_is_told_by_name_with_a_remedy(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "other.nxs"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"other\.nxs.*name the mosaic\.nxs"):
        read_mosaic(path)


def test_an_hdf5_file_of_somebody_else_is_no_mosaic(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.nxs", "w") as file:
        file.create_group("entry/mosaic")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_mosaic(tmp_path / "other.nxs")


WRITER = """
import sys
from pathlib import Path
from dataclasses import replace
from streamprior.sinks.mosaic_file import write_mosaic
from tests.test_mosaic_file import make_image
image, serial = make_image((300, 300)), 0
while True:
    serial += 1
    write_mosaic(replace(image, serial=serial), Path(sys.argv[1]), {})
    print(serial, flush=True)
"""


def test_a_kill_leaves_an_image_whole(tmp_path: Path) -> None:
    path = tmp_path / MOSAIC_FILE
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            found = read_mosaic(path)  # a reader while it is written never sees half of one, either
            assert found.serial >= int(line)
            if int(line) >= 20:
                os.kill(writer.pid, signal.SIGKILL)
                break
        told = max([20, *(int(line) for line in writer.stdout)])
    found = read_mosaic(path)
    assert found.serial >= told
    check_equal(found, replace(make_image((300, 300)), serial=found.serial))
