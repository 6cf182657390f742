"""Ptychography end to end: a recorded scan and the same one over the wire, through the whole daemon, to the archive's mosaic."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zmq
from streamprior_sim.cxi import save
from streamprior_sim.gold_balls import Scan as TwinScan
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import Twin
from streamprior_sim.twin import build as build_twin

from streamprior.config import Config, make_config
from streamprior.daemon import EXIT_OK, Daemon, build, run
from streamprior.errors import ConfigError
from streamprior.ledger import Ledger
from streamprior.metrics import Meters
from streamprior.mosaic.probe import load_probe
from streamprior.outbox import Outbox
from streamprior.prior import save_prior
from streamprior.records import Detector, Frame, MosaicImage, Place
from streamprior.sinks.archive import read_run, run_folders
from streamprior.sinks.mosaic_file import read_mosaic
from streamprior.wire.dectris_v2 import StreamV2Decoder, encode_end, encode_image, encode_start
from tests.builders import diffraction, small_prior
from tests.test_daemon import free_port
from tests.test_mosaic import error_against
from tests.test_path import DATE, Kept

SHAPE = (104, 104)
FRAMES = 72


def twin(**changes: Any) -> Twin:
    few = {"frames": FRAMES, "sample.scan": "raster", "sample.subpixel": True}
    return build_twin(load_scenario("gold_balls", few | {key.replace("__", "."): value for key, value in changes.items()}))


def scan_of(one: Twin) -> TwinScan:
    scan = one.scan()
    assert scan is not None
    return scan


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with gold_balls.cxi, the probe alone, and a prior for its frames."""
    folder = tmp_path_factory.mktemp("scan")
    one = twin()
    save(one, folder / "gold_balls.cxi")
    np.save(folder / "probe.npy", scan_of(one).probe)
    save_prior(small_prior(SHAPE), folder / "prior.h5")
    return folder


def settings(folder: Path, out: Path, **sections: Any) -> Config:
    whole: dict[str, Any] = {
        "prior": str(folder / "prior.h5"),
        "recipe": "ptycho",
        "source": {"kind": "file", "path": str(folder / "gold_balls.cxi")},
        "mosaic": {"polish": False, "least_iou": 0.0, "finish": 3},
        "archive": {"folder": str(out)},
        "http": {"port": free_port()},
        "runs": {"late_s": 0.2},
        "compute": {"backend": "cpu"},
    }
    for section, values in sections.items():
        whole[section] = whole.get(section, {}) | values if isinstance(values, dict) else values
    return make_config(whole, "the test")


def gone_through(config: Config, until: Callable[[Daemon], bool] = lambda daemon: False) -> tuple[int, Daemon]:
    daemon = build(config)
    return run(daemon, lambda: until(daemon)), daemon


def only_run(out: Path) -> Path:
    (folder,) = run_folders(out)
    return folder


def archived(out: Path) -> MosaicImage:
    return read_mosaic(only_run(out) / "mosaic.nxs")


def metric(daemon: Daemon, name: str, **labels: str) -> float:
    value = daemon_registry(daemon).get_sample_value(f"streamprior_{name}", labels or None)
    assert value is not None, name
    return float(value)


def daemon_registry(daemon: Daemon) -> Any:
    (outbox,) = [one for one in daemon.pipeline._outboxes if one.sink.name == "prometheus"]
    return outbox._meters.registry


def assert_same_image(one: MosaicImage, other: MosaicImage) -> None:
    for field in dataclasses.fields(MosaicImage):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "frames":
            for column in dataclasses.fields(a):
                np.testing.assert_array_equal(getattr(a, column.name), getattr(b, column.name))
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        elif field.name not in ("run", "serial"):
            assert a == b or (math.isnan(a) and math.isnan(b)), field.name


def error(image: MosaicImage, scan: TwinScan) -> float:
    origin = tuple(place / edge for place, edge in zip(image.origin, image.pixel, strict=True))
    return error_against(image.object, image.light, origin, scan.object)  # type: ignore[arg-type]


def test_a_recorded_scan_becomes_a_mosaic_in_the_archive(recorded: Path, tmp_path: Path) -> None:
    code, daemon = gone_through(settings(recorded, tmp_path / "out"))
    assert code == EXIT_OK
    image = archived(tmp_path / "out")
    assert image.final
    assert image.unit == "m"
    assert image.pixel == pytest.approx(scan_of(twin()).pixel_m, rel=1e-3)
    assert (image.frames.place == Place.IN).all()
    assert image.frames.index.tolist() == list(range(FRAMES))
    assert not image.warnings
    assert error(image, scan_of(twin())) < 0.5
    about = json.loads((only_run(tmp_path / "out") / "run.json").read_text())
    assert about["status"] == "complete"
    assert about["mosaic"]["frames_in"] == FRAMES
    assert about["mosaic"]["final"] is True
    stored = read_run(only_run(tmp_path / "out"))
    assert len(stored.frames) == len(stored.classes) == FRAMES
    assert metric(daemon, "mosaic_frames", place="in") == FRAMES
    assert metric(daemon, "mosaic_warnings") == 0
    assert metric(daemon, "mosaic_passes") == image.passes > 0


def test_the_archives_mosaic_holds_a_probe_for_the_next_run(recorded: Path, tmp_path: Path) -> None:
    gone_through(settings(recorded, tmp_path / "first", mosaic={"finish": 0}))
    mosaic = only_run(tmp_path / "first") / "mosaic.nxs"
    np.testing.assert_array_equal(load_probe(mosaic, SHAPE), archived(tmp_path / "first").probe)
    code, _ = gone_through(settings(recorded, tmp_path / "second", mosaic={"finish": 0, "probe": str(mosaic)}))
    assert code == EXIT_OK
    assert_same_image(archived(tmp_path / "first"), archived(tmp_path / "second"))


def messages(one: Twin, late: bool = False, number: int = 1) -> list[bytes]:
    """The scan on the wire; positions in their frames' messages, or all of them with the end message."""
    name, places = f"S{number}", [list(one.position(i) or ()) for i in range(len(one))]
    start = encode_start(number, name, one.detector(), len(one), one.frame(0).dtype, {})
    images = [
        encode_image(number, name, i, one.frame(i), 0.0, DATE, user_data=None if late else {"position_m": place})
        for i, place in enumerate(places)
    ]
    rows = {"positions_m": [[i, *place] for i, place in enumerate(places)]} if late else None
    return [start, *images, encode_end(number, name, rows)]


def streamed(config: Config, port: int, sent: Sequence[bytes], until: Callable[[Daemon], bool]) -> tuple[int, Daemon]:
    """Send to a daemon in this process; leave it as a signal would once `until` is true."""

    def send() -> None:
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.setsockopt(zmq.LINGER, 20000)
            push.connect(f"tcp://127.0.0.1:{port}")
            for message in sent:
                push.send(message)

    sender = threading.Thread(target=send)
    sender.start()
    deadline = time.monotonic() + 60
    try:
        return gone_through(config, lambda daemon: until(daemon) or time.monotonic() > deadline)
    finally:
        sender.join(30)


def over_the_wire(folder: Path, out: Path, port: int, **sections: Any) -> Config:
    source = {"kind": "dectris_v2", "path": None, "address": f"tcp://127.0.0.1:{port}"}
    sections["mosaic"] = {"probe": str(folder / "probe.npy")} | sections.get("mosaic", {})
    return settings(folder, out, source=source, **sections)


def received(frames: int) -> Callable[[Daemon], bool]:
    return lambda daemon: any(account["received"] >= frames for account in daemon.ledger.runs())


def finished(out: Path) -> Callable[[Daemon], bool]:
    """The run's last image is in its folder."""

    def found(daemon: Daemon) -> bool:
        for folder in run_folders(out) if out.is_dir() else []:
            about = json.loads((folder / "run.json").read_text())
            if (about.get("mosaic") or {}).get("final"):
                return True
        return False

    return found


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("late", [False, True], ids=["positions with frames", "positions with the end"])
def test_live_and_recorded_are_one_image_bit_for_bit(recorded: Path, tmp_path: Path, late: bool, refine: bool) -> None:
    mosaic = {"refine": refine}
    gone_through(settings(recorded, tmp_path / "file", mosaic=mosaic))
    port = free_port()
    config = over_the_wire(recorded, tmp_path / "wire", port, mosaic=mosaic)
    code, _ = streamed(config, port, messages(twin(), late=late), finished(tmp_path / "wire"))
    assert code == EXIT_OK
    assert_same_image(archived(tmp_path / "file"), archived(tmp_path / "wire"))


def test_a_stop_in_mid_run_drains_what_was_sent_and_leaves_an_image(recorded: Path, tmp_path: Path) -> None:
    port = free_port()
    config = over_the_wire(recorded, tmp_path / "wire", port, mosaic={"finish": 1000})
    code, daemon = streamed(config, port, messages(twin())[: FRAMES // 2 + 1], received(FRAMES // 2))
    assert code == EXIT_OK
    image = archived(tmp_path / "wire")
    assert image.final
    assert (image.frames.place == Place.IN).sum() == FRAMES // 2
    about = json.loads((only_run(tmp_path / "wire") / "run.json").read_text())
    assert about["status"] == "interrupted"
    assert about["mosaic"]["frames_in"] == FRAMES // 2
    assert daemon.ledger.is_balanced()


def test_a_stop_during_the_last_passes_leaves_them_undone(recorded: Path, tmp_path: Path) -> None:
    port = free_port()
    config = over_the_wire(recorded, tmp_path / "wire", port, mosaic={"finish": 1000})

    def over(daemon: Daemon) -> bool:
        return any(account["closed"] for account in daemon.ledger.runs())

    started = time.monotonic()
    code, _ = streamed(config, port, messages(twin()), over)
    assert code == EXIT_OK
    assert time.monotonic() - started < 40  # a thousand passes take minutes
    assert archived(tmp_path / "wire").final


def test_a_sink_gets_the_last_image_of_each_run_also_when_the_next_runs_image_comes_before_it_looks(recorded: Path, tmp_path: Path) -> None:
    gone_through(settings(recorded, tmp_path / "out", mosaic={"finish": 0}))
    image = archived(tmp_path / "out")
    noted: list[MosaicImage] = []

    class Noting(Kept):
        def note(self, item: Any) -> None:
            noted.append(item)

    ledger = Ledger(["archive"])
    outbox = Outbox(Noting(), 2**20, ledger, Meters("eiger", (), ["archive"], (), ()))
    for uid, serial, final in (("first", 1, False), ("first", 2, True), ("second", 1, False), ("second", 2, False)):
        outbox.put(replace(image, run=uid, serial=serial, final=final))
    outbox.leave()
    while outbox.step():
        pass
    assert [(one.run, one.serial) for one in noted] == [("first", 2), ("second", 2)]


def test_two_runs_back_to_back_have_an_image_each(recorded: Path, tmp_path: Path) -> None:
    port = free_port()
    config = over_the_wire(recorded, tmp_path / "wire", port, mosaic={"finish": 6})
    one = twin()
    sent = [message for number in (1, 2) for message in messages(one, number=number)]

    def both(daemon: Daemon) -> bool:
        folders = run_folders(tmp_path / "wire") if (tmp_path / "wire").is_dir() else []
        abouts = [json.loads((folder / "run.json").read_text()) for folder in folders]
        return len([about for about in abouts if (about.get("mosaic") or {}).get("final")]) == 2

    code, _ = streamed(config, port, sent, both)
    assert code == EXIT_OK
    first, second = (read_mosaic(folder / "mosaic.nxs") for folder in run_folders(tmp_path / "wire"))
    assert first.run != second.run
    assert_same_image(first, second)


def test_a_hard_day_is_told_frame_by_frame(recorded: Path, tmp_path: Path) -> None:
    one = twin(
        sample__position_missing_share=0.1,
        detector__no_data_frames=[30, 31],
        drift__steps=[{"frame": 40, "frames": 12, "flux": 0.001}],
    )
    save(one, tmp_path / "hard.cxi")
    code, _ = gone_through(settings(recorded, tmp_path / "out", source={"path": str(tmp_path / "hard.cxi")}, mosaic={"wait_s": 0.5}))
    assert code == EXIT_OK
    image = archived(tmp_path / "out")
    silent = {i for i in range(FRAMES) if one.position(i) is None}
    assert silent
    became = dict(zip(image.frames.index.tolist(), image.frames.place.tolist(), strict=True))
    assert len(became) == FRAMES
    assert {i for i, place in became.items() if place == Place.NO_POSITION} == silent
    assert {i for i, place in became.items() if place == Place.OUTLIER} == {30, 31} - silent
    assert {i for i, place in became.items() if place == Place.NO_BEAM} == set(range(40, 52)) - silent
    assert len(image.warnings) == 3
    # Of 48 frames, a third of them missing in the middle; all 72 reach 0.4.
    assert error(image, scan_of(twin())) < 0.65


def test_positions_that_are_none_leave_their_frames_out_and_the_others_in(recorded: Path, tmp_path: Path) -> None:
    one, port = twin(), free_port()
    odd: dict[int, Any] = {20: [float("nan"), 1e-6], 30: [float("inf"), 0.0], 40: [1.0, 1.0], 50: [], 60: "here"}
    images = [
        encode_image(1, "S1", i, one.frame(i), 0.0, DATE, user_data={"position_m": odd.get(i, list(one.position(i) or ()))})
        for i in range(FRAMES)
    ]
    sent = [encode_start(1, "S1", one.detector(), FRAMES, one.frame(0).dtype, {}), *images, encode_end(1, "S1")]
    config = over_the_wire(recorded, tmp_path / "wire", port)
    code, _ = streamed(config, port, sent, finished(tmp_path / "wire"))
    assert code == EXIT_OK
    frames = archived(tmp_path / "wire").frames
    became = dict(zip(frames.index.tolist(), frames.place.tolist(), strict=True))
    assert {i: place for i, place in became.items() if place != Place.IN} == {
        20: Place.NO_POSITION,
        30: Place.NO_POSITION,
        40: Place.OUTSIDE,
        50: Place.NO_POSITION,
        60: Place.NO_POSITION,
    }


@pytest.mark.parametrize("told", [{"position_m": [None, None]}, {"positions_m": [[0, None, None]]}, {"position_m": ["a", "b"]}])
def test_a_position_that_is_no_number_is_none_and_costs_no_frame(told: dict[str, Any]) -> None:
    decoder = StreamV2Decoder("eiger")
    decoder.decode(encode_start(1, "S1", Detector(shape=(4, 4)), 1, np.dtype(np.uint16), {}), 0.0)[0]
    frame = decoder.decode(encode_image(1, "S1", 0, np.ones((4, 4), np.uint16), 0.0, DATE, user_data=told), 0.0)[0]
    assert isinstance(frame, Frame)
    assert frame.position is None
    assert not frame.late


def test_wrong_axes_are_said_in_the_archive(recorded: Path, tmp_path: Path) -> None:
    code, daemon = gone_through(settings(recorded, tmp_path / "out", mosaic={"axes": "y-x", "finish": 0}))
    assert code == EXIT_OK
    about = json.loads((only_run(tmp_path / "out") / "run.json").read_text())
    (warning,) = about["mosaic"]["warnings"]
    assert "check the signs and the order of the positions" in warning
    assert warning.endswith("with 'xy'")
    assert metric(daemon, "mosaic_warnings") == 1


@pytest.mark.parametrize(
    ("mosaic", "says"),
    [
        ({"trust": {"speck": 0.5}}, "mosaic.trust: speck is no class of this prior"),
        ({"probe": "nowhere.npy"}, "mosaic.probe: nowhere.npy cannot be read"),
        ({"modes": 9}, "mosaic.modes: .* and 9 are asked for; further ones need mosaic.refine: true"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_accepted(recorded: Path, tmp_path: Path, mosaic: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(settings(recorded, tmp_path / "out", mosaic=mosaic))


def test_a_stream_needs_the_name_of_a_probe(recorded: Path, tmp_path: Path) -> None:
    config = settings(recorded, tmp_path / "out", source={"kind": "dectris_v2", "path": None})
    with pytest.raises(ConfigError, match=r"mosaic\.probe: a mosaic begins with an illumination"):
        build(config)


def test_a_prior_of_another_size_than_the_probe_is_refused(recorded: Path, tmp_path: Path) -> None:
    save_prior(small_prior((64, 64)), tmp_path / "small.h5")
    with pytest.raises(ConfigError, match="104 x 104 pixels, prepared frames are 64 x 64"):
        build(settings(recorded, tmp_path / "out", prior=str(tmp_path / "small.h5")))


def test_a_run_without_positions_is_archived_without_a_mosaic(recorded: Path, tmp_path: Path) -> None:
    with h5py.File(recorded / "gold_balls.cxi") as file:
        np.save(tmp_path / "frames.npy", file["entry_1/instrument_1/detector_1/data"][:20])
    code, _ = gone_through(
        settings(
            recorded,
            tmp_path / "out",
            source={"path": str(tmp_path / "frames.npy")},
            mosaic={"probe": str(recorded / "probe.npy"), "wait_s": 0.1},
        )
    )
    assert code == EXIT_OK
    folder = only_run(tmp_path / "out")
    assert not (folder / "mosaic.nxs").exists()
    assert len(read_run(folder).frames) == 20


def test_bragg_runs_know_nothing_of_mosaics(tmp_path: Path) -> None:
    save_prior(small_prior(), tmp_path / "prior.h5")
    np.save(tmp_path / "frames.npy", diffraction(count=12))
    source = {"kind": "file", "path": str(tmp_path / "frames.npy")}
    code, daemon = gone_through(settings(tmp_path, tmp_path / "out", recipe="bragg", source=source))
    assert code == EXIT_OK
    folder = only_run(tmp_path / "out")
    assert not (folder / "mosaic.nxs").exists()
    assert json.loads((folder / "run.json").read_text()).get("mosaic") is None
    assert read_run(folder).objects.shape[0] == 12
    assert "mosaic" not in {outbox.sink.name for outbox in daemon.pipeline._outboxes}
