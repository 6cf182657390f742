"""Streamed mosaics beside offline reconstructions at equal passes: a measured Siemens star, gold balls with their truth, faulty scans."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft
from streamprior_sim.cxi import save
from streamprior_sim.gold_balls import Scan as TwinScan
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import Twin, build

from streamprior.config import MosaicSettings
from streamprior.errors import ConfigError
from streamprior.evaluate.mosaics import stream_mosaic
from streamprior.mosaic.agreement import Agreement, agreement, onto, well_lit
from streamprior.mosaic.probe import Modes, load_probe, scaled, with_modes
from streamprior.prior import Prior
from streamprior.records import MosaicImage, Place
from streamprior.sources.files import Recording, open_recording
from streamprior.train.grow import grow_prior
from streamprior.train.settings import TrainSettings

Array = npt.NDArray[Any]
Row = dict[str, Any]

STAR = MosaicSettings(refine=True, modes=2)
"""The star's file has a probe of another focus: it is refined, with a second mode."""

BALLS = MosaicSettings()
OFFSET_PX = 900
"""A stage whose zero is elsewhere: 10 um, in whole object pixels, so that the truth can be laid beside it."""

LEAST_GROUND_PX = 400
"""Pixels that ground first lit between two stops must have to be followed by itself."""

RULES = [(weight, memory) for weight in (0.01, 0.05, 0.1, 0.3, 1.0) for memory in (0.0, 0.1, 0.3, 1.0)]


@dataclass(frozen=True)
class Offline:
    """An image made by another program: object, (row, column) of its first pixel in the positions' pixels, refined probe, seconds."""

    name: str
    object: Array
    corner: tuple[float, float]
    probe: Array
    seconds: float


def run(repeats: int = 1) -> Iterator[Row]:
    """Rows of all parts with the part they belong to; nothing is repeated."""
    folder = Path(os.environ.get("STREAMPRIOR_DATA", "../shared/data"))
    star, balls = folder / "ptycho_siemens_star.cxi", folder / "gold_balls_cxidb65_reconstruction.h5"
    for file in (star, balls):
        if not file.exists():
            raise ConfigError(f"{file}: no such file; set STREAMPRIOR_DATA to the folder that holds it")
    yield from _star(star)
    with TemporaryDirectory() as place:
        twin = build(load_scenario("gold_balls", {"sample.data": str(balls)}))
        recording = _recorded(twin, Path(place))
        yield from _balls(twin, recording)
        yield from _rules("gold balls", recording, _prior(recording), _scan_of(twin).probe, _scan_of(twin))
        yield from _faults(twin, recording)


def _star(file: Path) -> Iterator[Row]:
    """Streamed in the order of the scan, all frames and each half by itself, beside offline programs with as many passes."""
    prior = _prior(open_recording(file, "0::4"))
    probe = load_probe(file, prior.geometry.shape)
    images: dict[str, MosaicImage] = {}
    for frames in (":", "0::2", "1::2"):
        recording = open_recording(file, frames)
        begun = time.perf_counter()
        quarters = [round(len(recording) * part / 4) for part in (1, 2, 3)]
        for image in stream_mosaic(recording, prior, STAR, probe, quarters if frames == ":" else ()):
            images[frames] = image
            if frames == ":":
                yield {"part": "star", "arm": "streamed", **_live(image), "seconds": time.perf_counter() - begun}
    yield from _rules("star", open_recording(file), prior, images[":"].probe, None)
    halves = _halves(images["0::2"], images["1::2"])
    passes = round(1 + images[":"].passes / len(images[":"].frames.index))
    yield {
        "part": "star",
        "arm": "streamed, then passes after the run",
        "passes": passes,
        "chi2": images[":"].chi2,
        "halves_disagreement": halves.disagreement,
        "halves_resolution_px": halves.resolution_px,
    }
    counts, corners = _frames(open_recording(file))
    photons = float(np.median(counts.sum((1, 2))))
    for name, modes in (("scipy ePIE", 1), ("scipy ePIE", 2), ("Pty-Chi ePIE", 2), ("Pty-Chi LSQML", 2), ("Pty-Chi AD", 2)):
        yield _offline_arm(name, counts, corners, with_modes(scaled(probe, photons), modes), passes)


def _offline_arm(name: str, counts: Array, corners: Array, probe: Array, passes: int) -> Row:
    """Another program on the same frames with the probe refined from the fourth pass on: all frames, and each half by itself."""
    arm = {"part": "star", "arm": f"{name}, {len(probe)} mode{'s' if len(probe) > 1 else ''}, offline", "passes": passes}
    even = np.arange(len(counts)) % 2 == 0
    try:
        whole = _solve(name, counts, corners, probe, passes, 3)
        a, b = (_solve(name, counts[half], corners[half], probe, passes, 3) for half in (even, ~even))
    except (ModuleNotFoundError, RuntimeError) as error:
        return arm | {"note": f"not run: {error}"}
    found = agreement(*_common(a, b, _light(corners[even], a), _light(corners[~even], b)))
    return arm | {
        "chi2": _chi2(counts, corners, whole),
        "halves_disagreement": found.disagreement,
        "halves_resolution_px": found.resolution_px,
        "seconds": whole.seconds,
    }


def _rules(name: str, recording: Recording, prior: Prior, probe: Modes, scan: TwinScan | None) -> Iterator[Row]:
    """What weight and memory do to the halves after one pass with a probe that is held: the defaults are chosen here."""
    plain = MosaicSettings(settle=False, finish=0)
    cases: list[dict[str, Any]] = [{"weight": max(weight, 0.001), "memory": memory} for weight, memory in RULES]
    cases += [{"iterations": 3}, {"trust": {"background": 0.5}}, {"trust": {"background": 0.0}}]
    for case in cases:
        settings = plain.model_copy(update=case)
        *_, image = stream_mosaic(recording, prior, settings, probe)
        yield {
            "part": "rules",
            "set": name,
            "weight": settings.weight,
            "memory": settings.memory,
            "iterations": settings.iterations,
            "background_trust": settings.trust.get("background", 1.0),
            "halves_disagreement": image.disagreement,
            "halves_resolution_px": image.resolution / float(np.mean(image.pixel)),
            "error": _error(image, scan)[0] if scan is not None else None,
            "chi2": image.chi2,
        }


def _balls(twin: Twin, recording: Recording) -> Iterator[Row]:
    """The error against the truth as the scan goes on, and beside offline reconstructions with as many passes."""
    scan = _scan_of(twin)
    prior = _prior(recording)
    stops = [round(len(recording) * part / 16) for part in range(1, 16)]
    total = 1
    for settings, arm in ((BALLS, "streamed"), (BALLS.model_copy(update={"settle": False}), "streamed, not settled")):
        begun = time.perf_counter()
        grounds: list[tuple[Array, float]] = []  # ground by the stop at which it was first lit, and its least error so far
        known: Array | None = None
        for image in stream_mosaic(recording, prior, settings, scan.probe, stops):
            error, lit = _error(image, scan)
            now = [(ground, _error(image, scan, ground)[0]) for ground, _ in grounds]
            rises = [one / least for (_, one), (_, least) in zip(now, grounds, strict=True)]
            grounds = [(ground, min(one, least)) for (ground, one), (_, least) in zip(now, grounds, strict=True)]
            fresh = lit if known is None else lit & ~known
            known = lit if known is None else known | lit
            if np.count_nonzero(fresh) >= LEAST_GROUND_PX:
                grounds.append((fresh, _error(image, scan, fresh)[0]))
            yield {
                "part": "gold balls",
                "arm": arm,
                **_live(image),
                "error": error,
                "error_of_the_first_region": now[0][1] if now else error,
                "worst_rise_of_any_region": max(rises, default=1.0),
                "regions": len(grounds),
                "seconds": time.perf_counter() - begun,
            }
        if arm == "streamed":
            total = round(1 + image.passes / len(image.frames.index))
    counts = np.stack([recording.frame(i) for i in range(len(recording))]).astype(np.float32)
    corners = np.asarray(scan.corners)
    for passes in (1, 4, total):
        for name in ("scipy ePIE", "Pty-Chi ePIE", "Pty-Chi LSQML"):
            try:
                solved = _solve(name, counts, corners, scan.probe, passes, None)
            except (ModuleNotFoundError, RuntimeError) as why:
                yield {"part": "gold balls", "arm": f"{name}, offline", "passes": passes, "note": f"not run: {why}"}
                continue
            yield {
                "part": "gold balls",
                "arm": f"{name}, offline",
                "passes": passes,
                "error": _error_of(solved.object, solved.corner, _light(corners, solved), scan),
                "chi2": _chi2(counts, corners, solved),
                "seconds": solved.seconds,
            }


def _faults(twin: Twin, recording: Recording) -> Iterator[Row]:
    """One fault at a time: what is said, and what it does to the error."""
    scan, prior = _scan_of(twin), _prior(recording)
    assert recording.positions is not None
    right = recording.positions
    rng = np.random.default_rng(0)
    wrong_probe = np.roll(scan.probe, 7, axis=1) * np.exp(2j * np.pi * np.linspace(-1, 1, scan.probe.shape[2]) ** 2)
    missing = right.copy()
    missing[rng.permutation(len(right))[: len(right) // 10]] = np.nan
    stage = np.array([-1.0, 1.0])
    cases: list[tuple[str, Recording, Array, Modes]] = [
        ("none", recording, right, scan.probe),
        ("sign of x", recording, right * stage, scan.probe),
        ("sign of y", recording, right * -stage, scan.probe),
        ("axes swapped", recording, right[:, ::-1], scan.probe),
        (f"offset of {OFFSET_PX} pixels", recording, right + OFFSET_PX * np.array(scan.pixel_m[::-1]), scan.probe),
        ("10 % without position", recording, missing, scan.probe),
        ("wrong probe", recording, right, wrong_probe.astype(np.complex64)),
        ("beam dump of 20 frames, two frames of no data", _rough(twin, recording), right, scan.probe),
    ]
    settings = BALLS.model_copy(update={"finish": 2})
    for name, frames, positions, probe in cases:
        *_, image = stream_mosaic(frames, prior, settings, probe, positions=positions)
        wrong_axes = name.startswith(("sign", "axes"))
        back = [first - OFFSET_PX * pixel for first, pixel in zip(image.origin, scan.pixel_m, strict=True)]
        moved = replace(image, origin=(back[0], back[1])) if name.startswith("offset") else image
        yield {
            "part": "faults",
            "fault": name,
            "said": "; ".join(image.warnings) or "nothing",
            "error": None if wrong_axes else _error(moved, scan)[0],
            "chi2": image.chi2,
            "left_out": int(np.count_nonzero(image.frames.place != Place.IN)),
        }


def _rough(twin: Twin, recording: Recording) -> Recording:
    """The same frames with the beam gone for 20 of them, and two that hold no data."""
    stack = np.stack([recording.frame(i) for i in range(len(recording))])
    middle = len(stack) // 2
    stack[middle : middle + 20] = np.random.default_rng(1).poisson(0.001, stack[:20].shape)
    stack[[middle + 50, middle + 90]] = np.iinfo(stack.dtype).max
    return replace(recording, stack=stack)


def _recorded(twin: Twin, place: Path) -> Recording:
    return open_recording(save(twin, place / "balls.cxi"))


def _prior(recording: Recording) -> Prior:
    return grow_prior(recording, settings=TrainSettings(library=0, frames=32, survey=64))


def _scan_of(twin: Twin) -> TwinScan:
    scan = twin.scan()
    assert scan is not None
    return scan


def _live(image: MosaicImage) -> Row:
    return {
        "frames": len(image.frames.index),
        "final": image.final,
        "passes": 1 + image.passes / len(image.frames.index),
        "chi2": image.chi2,
        "live_disagreement": image.disagreement,
        "live_resolution_px": image.resolution / float(np.mean(image.pixel)),
    }


def _halves(first: MosaicImage, second: MosaicImage) -> Agreement:
    """Of two runs that shared nothing, not even the refined probe."""
    a, b = (
        Offline("", image.object, (image.origin[0] / image.pixel[0], image.origin[1] / image.pixel[1]), image.probe, 0.0)
        for image in (first, second)
    )
    return agreement(*_common(a, b, first.light, second.light))


def _common(a: Offline, b: Offline, light_a: Array, light_b: Array) -> tuple[Array, Array, Array]:
    """Both objects where they overlap, and the lesser light."""
    first = [max(round(a.corner[k]), round(b.corner[k])) for k in (0, 1)]
    last = [min(round(one.corner[k]) + one.object.shape[k] for one in (a, b)) for k in (0, 1)]
    cuts = [tuple(slice(first[k] - round(one.corner[k]), last[k] - round(one.corner[k])) for k in (0, 1)) for one in (a, b)]
    return a.object[cuts[0]], b.object[cuts[1]], np.minimum(light_a[cuts[0]], light_b[cuts[1]])


def _error(image: MosaicImage, scan: TwinScan, where: Array | None = None) -> tuple[float, Array]:
    """Error against the truth, and where it was taken, on the truth's pixels."""
    corner = (image.origin[0] / scan.pixel_m[0], image.origin[1] / scan.pixel_m[1])
    light = np.zeros(scan.object.shape)
    _paste(light, image.light, corner)
    lit = well_lit(light) if where is None else where
    return _error_of(image.object, corner, image.light, scan, lit), lit


def _error_of(object: Array, corner: tuple[float, float], light: Array, scan: TwinScan, lit: Array | None = None) -> float:
    """|image - truth| over the truth's contrast, rms where it is well lit, after the best factor and linear phase."""
    image, had = np.ones(scan.object.shape, np.complex64), np.zeros(scan.object.shape)
    _paste(image, object, corner)
    _paste(had, light, corner)
    where = well_lit(had) if lit is None else lit
    brought = onto(scan.object, image, where)
    contrast = np.sqrt(np.mean(np.abs(scan.object[where] - scan.object[where].mean()) ** 2))
    return float(np.sqrt(np.mean(np.abs(brought - scan.object)[where] ** 2)) / contrast)


def _paste(canvas: Array, image: Array, corner: tuple[float, float]) -> None:
    """Lay an image on a canvas; what reaches beyond is cut."""
    row, column = round(corner[0]), round(corner[1])
    top, left = max(0, row), max(0, column)
    bottom, right = min(canvas.shape[0], row + image.shape[0]), min(canvas.shape[1], column + image.shape[1])
    canvas[top:bottom, left:right] = image[top - row : bottom - row, left - column : right - column]


def _frames(recording: Recording) -> tuple[Array, Array]:
    """Counts, and corners of the windows in pixels."""
    counts = np.stack([recording.frame(i) for i in range(len(recording))]).astype(np.float32)
    positions = [recording.position(i) or (np.nan, np.nan) for i in range(len(recording))]
    return counts, np.array(positions)[:, ::-1]


def _solve(name: str, counts: Array, corners: Array, probe: Array, passes: int, probe_from: int | None) -> Offline:
    """Another program's object. Raises ModuleNotFoundError where it is not installed."""
    if name == "scipy ePIE":
        return _epie(counts, corners, probe, passes, probe_from)
    from streamprior_bench.offline import PtyChiSettings, ptychi_solve

    algorithm = name.removeprefix("Pty-Chi ")
    settings = PtyChiSettings(algorithm=algorithm, epochs=passes, probe_from=probe_from, strength=0.5 if algorithm == "AD" else 1.0)
    solved = ptychi_solve(counts, probe, corners, settings)
    return Offline(name, solved.object, solved.corner, solved.probe, sum(solved.epoch_s))


def _epie(counts: Array, corners: Array, probe: Array, passes: int, probe_from: int | None) -> Offline:
    """Maiden & Rodenburg 2009, single precision, FFT order, whole pixels, a new order of the frames each pass."""
    whole = np.rint(corners).astype(int)
    first = whole.min(0) - 1
    image = np.ones(whole.max(0) - first + np.array(counts.shape[1:]) + 1, np.complex64)
    targets = np.sqrt(scipy.fft.ifftshift(counts, axes=(1, 2)) * np.float32(counts[0].size))
    probe, rng = probe.copy(), np.random.default_rng(0)
    begun = time.perf_counter()
    for one in range(passes):
        for i in rng.permutation(len(counts)):
            row, column = whole[i] - first
            seen = image[row : row + counts.shape[1], column : column + counts.shape[2]]
            psi = probe * seen
            field = scipy.fft.fft2(psi, workers=1)
            field *= targets[i] / np.maximum(np.sqrt((np.abs(field) ** 2).sum(0)), np.float32(1e-12))
            change = scipy.fft.ifft2(field, workers=1) - psi
            before = seen.copy()
            seen += (probe.conj() * change).sum(0) / (np.abs(probe) ** 2).sum(0).max()
            if probe_from is not None and one >= probe_from:
                probe += before.conj() * change / (np.abs(before) ** 2).max()
    return Offline("scipy ePIE", image, (float(first[0]), float(first[1])), probe, time.perf_counter() - begun)


def _light(corners: Array, solved: Offline) -> Array:
    """What fell on the object, from positions and probe."""
    light, own = np.zeros(solved.object.shape), (np.abs(solved.probe) ** 2).sum(0)
    for row, column in np.rint(corners - np.array(solved.corner)).astype(int):
        light[row : row + own.shape[0], column : column + own.shape[1]] += own
    return light


def _chi2(counts: Array, corners: Array, solved: Offline) -> float:
    """Over all frames, whole pixels (docs/physics.md section 2)."""
    misfit = 0.0
    for frame, (row, column) in zip(counts, np.rint(corners - np.array(solved.corner)).astype(int), strict=True):
        seen = solved.object[row : row + frame.shape[0], column : column + frame.shape[1]]
        modulus = np.sqrt((np.abs(scipy.fft.fft2(solved.probe * seen, norm="ortho")) ** 2).sum(0))
        misfit += float(((modulus - np.sqrt(scipy.fft.ifftshift(frame))) ** 2).sum(dtype=np.float64))
    return misfit / float(counts.sum(dtype=np.float64))
