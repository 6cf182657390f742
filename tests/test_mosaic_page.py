"""The running image of the sample, on the live page and in the metrics: what the bytes mean, what is left out, that a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamprior.metrics import Meters
from streamprior.records import Flag, MosaicFrames, MosaicImage, Place, Positions
from streamprior.sinks.page import POINTS, RINGS, SIDE, LivePage
from tests.builders import NAMES, make_run, small_prior
from tests.test_server import Served, shown, unpack

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAN = float("nan")


def make_frames(count: int = 6) -> MosaicFrames:
    """The second one without a position, the third without beam."""
    place = np.zeros(count, np.uint8)
    place[1:3] = Place.NO_POSITION, Place.NO_BEAM
    position = np.arange(2 * count, dtype=float).reshape(count, 2)
    position[1] = NAN
    before = np.linspace(0.4, 0.1, count, dtype=np.float32)
    before[1:3] = NAN
    return MosaicFrames(np.arange(10, 10 + count), position, place, before, before / 2, np.ones(count, np.float32))


def make_image(shape: tuple[int, int] = (30, 40), phase: float = 0.3, **changes: Any) -> MosaicImage:
    """A ramp of amplitude down the rows and of phase along the columns, all of it lit alike."""
    rows, columns = np.meshgrid(*(np.linspace(0, 1, side) for side in shape), indexing="ij")
    image = MosaicImage(
        run="run-1",
        serial=3,
        final=False,
        object=((0.5 + 0.5 * rows) * np.exp(1j * phase * (columns - 0.5))).astype(np.complex64),
        light=np.full(shape, 100, np.float32),
        uncertainty=(0.02 * columns).astype(np.float32),
        probe=np.ones((2, 8, 9), np.complex64),
        unit="m",
        pixel=(1e-8, 2e-8),
        origin=(-1e-6, 3e-6),
        frequency=np.linspace(0, 0.5, 201, dtype=np.float32),
        correlation=np.linspace(1, 0, 201, dtype=np.float32),
        threshold=np.full(201, 0.2, np.float32),
        resolution=2.5e-8,
        disagreement=0.12,
        chi2=0.05,
        passes=7,
        frames=make_frames(),
    )
    return replace(image, **changes)


def pictured(image: MosaicImage) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    page = LivePage(small_prior())
    page.note(image)
    picture = page.mosaic_picture()
    assert picture is not None
    return unpack(picture)


def values(header: dict[str, Any], images: dict[str, np.ndarray], name: str) -> np.ndarray:
    """What a map's bytes stand for, and half a byte more as they are rounded down."""
    low, high = header["ranges"][name]
    return low + (images[name] + 0.5) / 255 * (high - low)


def test_the_bytes_and_their_ranges_give_the_sample_back() -> None:
    image = make_image()
    header, images = pictured(image)
    inside = (slice(1, -1), slice(1, -1))  # the tails of the range are cut
    for name, truth in (("amplitude", np.abs(image.object)), ("phase", np.angle(image.object)), ("uncertainty", image.uncertainty)):
        low, high = header["ranges"][name]
        np.testing.assert_allclose(values(header, images, name)[inside], truth[inside], atol=(high - low) / 255, err_msg=name)
    assert images["lit"].all()
    assert header["ranges"]["probe"] == [0, 2]
    assert images["probe"].shape == (8, 9)
    assert header["ranges"]["light"][0] == 0


def test_the_header_holds_what_is_known_and_nothing_for_what_is_not() -> None:
    header, _ = pictured(make_image(warnings=("The probe does not fit.",)))
    assert (header["run"], header["image"], header["final"], header["unit"], header["passes"]) == ("run-1", 3, False, "m", 7)
    assert (header["pixel"], header["shape"], header["stride"]) == ([1e-8, 2e-8], [30, 40], 1)
    assert header["origin"] == [-1e-6, 3e-6]
    assert (header["resolution"], header["disagreement"], header["chi2"]) == (2.5e-8, 0.12, 0.05)
    assert header["frames"] == {"in": 4, "no_position": 1, "outside": 0, "no_beam": 1, "outlier": 0}
    assert (header["newest"], header["position"]) == (15, [10, 11])
    assert header["warnings"] == ["The probe does not fit."]
    header, _ = pictured(
        make_image(resolution=NAN, disagreement=NAN, chi2=NAN, frames=replace(make_frames(), position=np.full((6, 2), NAN)))
    )
    assert [header[name] for name in ("resolution", "disagreement", "chi2", "position")] == [None] * 4


def test_what_hardly_any_light_fell_on_is_not_measured_and_the_rim_is_cut_off() -> None:
    light = np.zeros((100, 100), np.float32)
    light[40:60, 20:70] = 100
    light[50, 30] = 4.9
    light[30:35, 20:70] = 4
    header, images = pictured(make_image((100, 100), light=light))
    assert header["shape"] == [22, 54], "the lit area and 3 % around it"
    assert header["origin"] == pytest.approx([-1e-6 + 39 * 1e-8, 3e-6 + 18 * 2e-8])
    expected = np.zeros((22, 54), np.uint8)
    expected[1:21, 2:52] = 1
    expected[11, 12] = 0
    np.testing.assert_array_equal(images["lit"], expected)


def test_the_amplitude_is_spread_over_the_lit_area_alone() -> None:
    image = make_image((40, 40))
    light, wild = image.light.copy(), image.object.copy()
    light[5:8, 5:8], wild[5:8, 5:8] = 0.1, 1000
    low, high = pictured(replace(image, light=light, object=wild))[0]["ranges"]["amplitude"]
    assert (low, high) == (pytest.approx(0.5, abs=0.02), pytest.approx(1, abs=0.02))


@pytest.mark.parametrize("constant", [0, 2, np.pi, -3])
def test_a_weak_phase_fills_its_scale_wherever_on_the_circle_it_lies(constant: float) -> None:
    image = make_image()
    header, images = pictured(replace(image, object=(image.object * np.exp(1j * constant)).astype(np.complex64)))
    low, high = header["ranges"]["phase"]
    assert not header["cyclic"]
    assert high - low == pytest.approx(0.3, abs=0.01)
    assert np.angle(np.exp(1j * ((low + high) / 2 - constant))) == pytest.approx(0, abs=0.01)
    assert (np.diff(images["phase"].astype(int), axis=1) >= 0).all(), "it does not wrap"
    assert np.ptp(images["phase"]) >= 254, "its scale is used up"


def test_a_strong_phase_is_shown_over_the_full_turn() -> None:
    image = make_image(phase=7.0)
    header, images = pictured(image)
    assert header["cyclic"]
    assert header["ranges"]["phase"] == pytest.approx([-np.pi, np.pi])
    np.testing.assert_allclose(values(header, images, "phase"), np.angle(image.object), atol=0.02)


def test_a_large_sample_is_thinned_by_a_whole_stride() -> None:
    image = make_image((2 * SIDE + 1, 100))
    header, images = pictured(image)
    assert (header["stride"], header["shape"], images["amplitude"].shape) == (3, [2 * SIDE + 1, 100], (683, 34))
    seen = values(header, images, "amplitude")
    np.testing.assert_allclose(seen[10:-10, 5], np.abs(image.object[30:-30:3, 15]), atol=0.003)


def test_without_halves_there_is_no_uncertainty_and_no_curve() -> None:
    none = np.empty(0, np.float32)
    header, images = pictured(make_image(uncertainty=np.full((30, 40), NAN, np.float32), frequency=none, correlation=none, threshold=none))
    assert "uncertainty" not in images
    assert "uncertainty" not in header["ranges"]
    assert header["rings"] == {"frequency": [], "correlation": [], "threshold": []}


def test_a_place_that_one_half_never_saw_is_as_uncertain_as_any() -> None:
    image = make_image()
    uncertainty = image.uncertainty.copy()
    uncertainty[3, 4] = NAN
    assert pictured(replace(image, uncertainty=uncertainty))[1]["uncertainty"][3, 4] == 255


def test_curves_are_thinned_and_keep_their_course() -> None:
    count = 5000
    before = np.linspace(1, 0, count, dtype=np.float32)
    many = MosaicFrames(np.arange(count), np.zeros((count, 2)), np.zeros(count, np.uint8), before, before, before)
    header, _ = pictured(make_image(frames=many))
    rings, errors = header["rings"], header["errors"]
    assert [len(curve) for curve in rings.values()] == [RINGS] * 3
    assert [len(curve) for curve in errors.values()] == [POINTS] * 2
    np.testing.assert_allclose(rings["correlation"], 1 - 2 * np.array(rings["frequency"]), atol=1e-6)
    np.testing.assert_allclose(errors["before"], 1 - np.array(errors["frames"]) / count, atol=1e-3)
    few, _ = pictured(make_image())
    assert few["errors"] == {"frames": [1, 2, 3, 4], "before": pytest.approx([0.4, 0.22, 0.16, 0.1])}


@pytest.mark.parametrize(
    "changes",
    [
        {"light": np.zeros((30, 40), np.float32)},
        {"object": np.ones((30, 40), np.complex64)},
        {"object": np.zeros((30, 40), np.complex64)},
        {"probe": np.zeros((1, 8, 9), np.complex64), "uncertainty": np.zeros((30, 40), np.float32)},
        {"frames": make_frames(3), "shape": (1, 1)},
    ],
)
def test_the_dullest_mosaic_has_a_picture_too(changes: dict[str, Any]) -> None:
    header, images = pictured(make_image(**changes))
    assert set(header["ranges"]) | {"lit"} == set(images)


def test_only_a_newer_mosaic_is_a_picture_and_positions_are_none() -> None:
    page = LivePage(small_prior())
    page.note(Positions("eiger", "S1", {0: (0.0, 0.0)}))
    assert (page.mosaic_picture(), page.mosaic_serial) == (None, 0)
    page.note(make_image())
    page.note(make_image(serial=4))
    picture = page.mosaic_picture()
    assert picture is not None
    assert unpack(picture)[0]["image"] == 4
    assert page.mosaic_picture(after=page.mosaic_serial) is None
    assert page.picture() is None, "it is no frame"


def test_the_last_image_of_a_run_does_not_push_out_that_of_the_next() -> None:
    page = LivePage(small_prior())

    def run_shown() -> str:
        picture = page.mosaic_picture()
        assert picture is not None
        return str(unpack(picture)[0]["run"])

    page.begin(make_run("one"))
    page.note(make_image(run="one"))
    page.begin(make_run("two"))
    page.note(make_image(run="one", final=True))
    assert run_shown() == "one", "the next one has none yet"
    page.note(make_image(run="two"))
    page.note(make_image(run="one", final=True))
    assert run_shown() == "two"


def test_everyone_who_looks_at_once_shares_one_mosaic() -> None:
    page = LivePage(small_prior())
    page.note(make_image((400, 400)))
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda _: page.mosaic_picture(), range(40)))
    assert len({id(picture) for picture in pictures}) == 1


def test_live_tells_of_a_mosaic_and_mosaic_hands_it_over() -> None:
    served = Served()
    try:
        assert served.get("/mosaic")[0] == 204
        served.page.note(make_image())
        status, kind, body = served.get("/mosaic?after=0")
        assert (status, kind) == (200, "application/octet-stream")
        assert unpack(body)[0]["serial"] == served.page.mosaic_serial == 1
        assert served.get("/mosaic?after=1")[0] == 204
        for path in ("/live", "/live?after=0"):
            assert served.header(path, "Mosaic") == "1"
            served.page.write([shown()])
    finally:
        served.server.stop()


def test_the_page_fetches_nothing_but_what_the_daemon_serves() -> None:
    served = Served()
    try:
        page = served.get("/")[2].decode()
        scripts = re.findall(r'<script src="([^"]+)"', page)
        assert scripts == ["page_mosaic.js"]
        status, kind, script = served.get("/page_mosaic.js")
        assert (status, kind) == (200, "text/javascript; charset=utf-8")
        assert not re.search(r"https?://", page + script.decode())
    finally:
        served.server.stop()


def test_the_gold_balls_are_a_weak_phase_object(data_folder: Path) -> None:
    with h5py.File(data_folder / "gold_balls_cxidb65_reconstruction.h5") as file:
        sample, probe = file["object"][()], file["probe"][()]
    shape = sample.shape
    header, images = pictured(make_image(shape, object=sample, probe=probe, uncertainty=np.zeros(shape, np.float32)))
    low, high = header["ranges"]["phase"]
    assert not header["cyclic"]
    assert -0.3 < low < 0 < high < 0.3
    assert np.ptp(images["phase"]) == 255, "the scale is used up"
    assert images["probe"].shape == (104, 104)


def test_the_mosaic_is_metered_in_metres_where_they_are_known() -> None:
    meters = Meters("eiger", ["mosaic"], ["archive"], NAMES, ["flux"])

    def scraped() -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(meters.render("text/plain")[0].decode())
        found = {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}
        return {(name.removeprefix("streamprior_mosaic_"), *rest): value for (name, *rest), value in found.items() if "mosaic_" in name}

    assert [value for name, value in scraped().items() if name[0] == "frames"] == [0] * len(Place)
    assert np.isnan([scraped()[name,] for name in ("chi2", "disagreement", "resolution_metres", "resolution_pixels")]).all()
    meters.mosaic(make_image(warnings=("The probe does not fit.",)))
    assert {name[0]: value for name, value in scraped().items() if name[0] != "frames"} == pytest.approx(
        {
            "chi2": 0.05,
            "disagreement": 0.12,
            "resolution_metres": 2.5e-8,
            "resolution_pixels": 2.5 / 1.5,
            "passes": 7,
            "warnings": 1,
            "pixels": 1200,
        }
    )
    assert {name[1]: value for name, value in scraped().items() if name[0] == "frames"} == {
        "in": 4,
        "no_position": 1,
        "outside": 0,
        "no_beam": 1,
        "outlier": 0,
    }
    meters.mosaic(make_image(unit="px", pixel=(1.0, 1.0), resolution=3.0))
    assert np.isnan(scraped()["resolution_metres",])
    assert scraped()["resolution_pixels",] == 3


def dumped(served: Served, folder: Path) -> str:
    """The page as it stands in a browser after a second."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--virtual-time-budget=2000"]
    command += ["--dump-dom", served.server.url + "/"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_the_sample_its_warnings_and_no_objects_of_single_frames(tmp_path: Path) -> None:
    served = Served()
    try:
        served.ledger.open_run(make_run("run-1"))
        served.page.write([shown(flags=int(Flag.NOT_REFINED))])
        before = dumped(served, tmp_path)
        assert re.search(r'<main id="sample" hidden', before)
        assert '<div id="frames">' in before or '<div id="frames" class="">' in before
        served.page.note(make_image(warnings=("The probe does not fit.",)))
        after = dumped(served, tmp_path)
    finally:
        served.server.stop()
    assert '<main id="sample">' in after
    assert '<div id="warnings" role="alert"><p>The probe does not fit.</p></div>' in after
    assert "25 nm (1.67 px)" in after
    assert "2 (no position 1, no beam 1)" in after
    assert '<div id="frames" class="lean">' in after
    assert '<span id="state" class="">run S1 is live' in after, "nothing in the page failed"
