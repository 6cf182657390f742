"""Growing a prior: what is found in measured and simulated frames, that it is found again, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

import streamprior as sp
from streamprior.cli import app
from streamprior.crew import think
from streamprior.errors import ConfigError
from streamprior.prior import FEATURES, Geometry, save_prior
from streamprior.sources.files import open_recordings
from streamprior.stages.prepare import Corrections
from streamprior.train import TrainSettings, grow_prior
from streamprior.train.classes import grow_classes, sample_pixels
from streamprior.train.region import centre_of_mass, find_geometry
from tests.builders import diffraction, make_frame, make_recipe, make_run

DATA = "entry_1/instrument_1/detector_1/data"
QUICK = TrainSettings(
    pixels=4000, frames=12, library=4, starts=1, neighbours=1, control=4, schedule="20*HIO+5*ER+SW(2.0)+10*ER", polish="5*ER"
)


@pytest.fixture(scope="module")
def curve(data_folder):
    """(101, 256, 256) int32: Set 1, the even frames of the measured rocking curve."""
    with h5py.File(data_folder / "bcdi_gold_rocking_curve.cxi") as file:
        return file[DATA][::2]


@pytest.fixture(scope="module")
def grown(curve):
    calls = []
    prior = grow_prior(curve, settings=TrainSettings(starts=2), progress=lambda *call: calls.append(call))
    return prior, calls


def crystal(size=96):
    """(size, size) complex object off the centre, with a phase, and without symmetry."""
    rows, columns = np.mgrid[:size, :size] - size // 2
    inside = (np.abs(rows + 4) < 9) & (np.abs(columns - 3) < 6) & (rows + columns < 8)
    return inside * np.exp(1j * 0.02 * (rows**2 - columns * rows))


def patterns(number=6, size=96, photons=3e6, seed=0):
    """(number, size, size) uint32: Poisson frames of the crystal, as bright as a detector sees them."""
    ideal = np.abs(np.fft.fftshift(np.fft.fft2(crystal(size)))) ** 2
    return np.random.default_rng(seed).poisson(photons * ideal / ideal.sum(), size=(number, size, size)).astype(np.uint32)


def test_the_bragg_peak_is_found_and_no_pixel_of_it_is_masked(grown):
    prior, _ = grown
    assert prior.geometry == Geometry((256, 256), (127, 128), (128, 128), 1)
    assert not prior.invalid.any()


def test_classes_run_from_the_core_to_the_background(grown):
    prior, _ = grown
    radius, intensity = prior.training["class_mean_radius"], prior.training["class_mean_intensity"]
    assert prior.class_names == ("core", "ring", "background")
    assert np.all(np.diff(np.round(radius)) >= 0)
    assert intensity[0] > 10 * intensity[-1]
    assert prior.reference[64, 64] == 0
    assert prior.reference[2, 2] == len(prior.centroids) - 1


def test_the_prior_holds_what_a_person_needs_to_overrule_it(grown):
    prior, _ = grown
    training = prior.training
    assert training["elbow_k"].tolist() == list(range(2, 11))
    assert np.all(np.diff(training["elbow_inertia"]) < 0)
    assert np.all((training["silhouette"] > -1) & (training["silhouette"] < 1))
    assert training["som_codebook"].shape == (49, len(prior.pca_components))
    assert set(training["som_class"]) == set(range(len(prior.centroids)))
    assert training["explained_variance"].sum() == pytest.approx(1)
    assert 0 < training["quantization_error"][0] < 1
    assert 0 <= training["topographic_error"][0] < 0.2
    assert training["explained_variance"][: len(prior.pca_components)].sum() >= 0.95
    assert np.allclose(prior.pca_components @ prior.pca_components.T, np.eye(len(prior.pca_components)), atol=1e-6)
    assert prior.feature_scale[FEATURES.index("angle")] == 0


def test_the_prior_says_how_well_its_classes_are_found_again(grown):
    training = grown[0].training
    assert training["stability_seeds"].shape == training["stability_frames"].shape == (3,)
    # Measured: 0.91 with other seeds, 0.77 in the other half of thirty useful frames.
    assert training["stability_seeds"].min() > 0.8
    assert training["stability_frames"].mean() > 0.6


def test_the_other_half_of_the_scan_looks_as_the_baselines_say(grown, data_folder):
    prior, _ = grown
    with h5py.File(data_folder / "bcdi_gold_rocking_curve.cxi") as file:
        odd = file[DATA][1::2]
    photons = sp.prepare(odd[odd.sum((1, 2)) > 2e5], prior)
    classes = sp.classify(photons, prior)
    chi2 = sp.refine(photons, sp.match(photons, prior), iterations=50).chi2
    for name, values in (("class_distance", classes.distance), ("chi2", chi2)):
        mean, deviation = prior.baselines[name]
        assert abs(values.mean() - mean) < 2 * deviation
    # A start from random noise without a support ends at 0 by over-fitting; far above 0.05 the support is wrong.
    assert np.median(chi2) < 0.03


def test_every_baseline_of_a_drift_signal_is_there_and_a_number(grown):
    prior, _ = grown
    wanted = {"flux", "flux_least", "class_distance", "distance", "chi2", "chi2_over_floor", "centre_row", "centre_column"}
    wanted |= {f"{what}_{name}" for what in ("fraction", "iou") for name in prior.class_names}
    assert set(prior.baselines) == wanted
    assert np.isfinite(list(prior.baselines.values())).all()
    assert sum(prior.baselines[f"fraction_{name}"][0] for name in prior.class_names) == pytest.approx(1)


def test_progress_tells_of_every_part_and_ends_it(grown):
    _, calls = grown
    assert [stage for stage in dict.fromkeys(stage for stage, _, _ in calls)] == [
        "survey",
        "pixels",
        "frames",
        "classes",
        "stability",
        "solve",
        "polish",
        "prototypes",
        "baselines",
    ]
    last = {stage: (done, total) for stage, done, total in calls}
    assert all(done == total for done, total in last.values())


def test_a_grown_prior_survives_its_file(grown, tmp_path):
    prior, _ = grown
    save_prior(prior, tmp_path / "prior.h5")
    assert sp.load_prior(tmp_path / "prior.h5").content_hash == prior.content_hash


def test_the_same_frames_give_the_same_prior_in_another_process_and_with_other_threads(tmp_path):
    frames = patterns()
    np.save(tmp_path / "frames.npy", frames)
    here = grow_prior(frames, settings=QUICK)
    program = (
        "import sys, numpy\n"
        "from streamprior.train import TrainSettings, grow_prior\n"
        "settings = TrainSettings.model_validate_json(sys.argv[2])\n"
        "print(grow_prior(numpy.load(sys.argv[1]), settings=settings).content_hash)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "frames.npy"), QUICK.model_dump_json()]
    there = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"}).stdout
    assert there.strip() == here.content_hash
    assert grow_prior(frames, settings=QUICK.model_copy(update={"seed": 1})).content_hash != here.content_hash


def test_frames_are_read_one_by_one():
    class OneByOne:
        """A dataset that is too large to be held: it gives single frames only."""

        def __init__(self, frames):
            self._frames = frames
            self.shape = frames.shape

        def __len__(self):
            return len(self._frames)

        def __getitem__(self, index):
            assert isinstance(index, int)
            return self._frames[index]

    frames = patterns()
    assert grow_prior(OneByOne(frames), settings=QUICK).content_hash == grow_prior(frames, settings=QUICK).content_hash


def test_the_support_covers_the_crystal_it_never_saw():
    prior = grow_prior(patterns(), settings=TrainSettings(pixels=4000, library=4, starts=1, control=2))
    truth = np.roll(crystal() != 0, (4, -3), (0, 1))
    best = max(np.count_nonzero(one & prior.support) for one in (truth, truth[::-1, ::-1]))
    assert best >= 0.9 * np.count_nonzero(truth)
    assert np.count_nonzero(prior.support) < 3.5 * np.count_nonzero(truth)


@pytest.mark.parametrize(
    ("detector", "shape"),
    [((128, 128), (128, 128)), ((64, 96), (64, 96)), ((105, 77), (104, 76)), ((514, 1030), (128, 128)), ((101, 200), (100, 100))],
)
def test_a_small_detector_is_kept_whole_and_a_large_one_cropped_to_a_quick_size(detector, shape):
    assert find_geometry(np.ones(detector)).shape == shape


def test_a_small_detector_keeps_its_centre_and_binning_divides_its_shape():
    mean = np.zeros((64, 64))
    mean[10, 50] = 1e6
    assert find_geometry(mean) == Geometry((64, 64), (32, 32), (64, 64), 1)
    assert find_geometry(mean, shape=32) == Geometry((64, 64), (10, 50), (32, 32), 1)
    assert find_geometry(mean, binning=2) == Geometry((64, 64), (32, 32), (32, 32), 2)
    with pytest.raises(ValueError, match="does not fit"):
        find_geometry(mean, shape=40, binning=2)


def test_the_centre_ignores_the_background():
    mean = np.random.default_rng(0).poisson(5.0, size=(300, 200)).astype(float)
    mean[250:253, 20:23] += 1e5
    assert centre_of_mass(mean) == (251, 21)
    assert centre_of_mass(np.zeros((30, 20))) == (15, 10)


def test_hot_dead_and_unread_pixels_are_found_and_bright_ones_kept():
    frames = patterns(12, 96)
    frames[:, 48, 50] = 0  # beside the centre, where every neighbour counts thousands
    frames[:, 5, 7] = 500
    frames[:, 90, 3] = np.iinfo(np.uint32).max
    frames[3, 20, 20] = 10_000  # a cosmic ray: one frame only
    prior = grow_prior(frames, settings=QUICK)
    assert set(zip(*np.nonzero(prior.invalid), strict=True)) == {(48, 50), (5, 7), (90, 3)}
    binned = grow_prior(frames, settings=QUICK.model_copy(update={"binning": 2}))
    assert set(zip(*np.nonzero(binned.invalid), strict=True)) == {(24, 25), (2, 3), (45, 1)}


def test_the_number_of_classes_can_be_told():
    for number in (2, 3, 12):
        prior = grow_prior(patterns(), settings=QUICK.model_copy(update={"classes": number}))
        assert prior.centroids.shape[0] == len(set(prior.class_names)) == number
        if number <= 3:
            assert (prior.class_names[0], prior.class_names[-1]) == ("core", "background")


def test_frames_without_signal_teach_nothing():
    frames = patterns(8)
    noise = np.random.default_rng(1).poisson(0.05, size=(30, *frames.shape[1:])).astype(np.uint32)
    mixed = grow_prior(np.concatenate([frames, noise]), settings=QUICK)
    assert mixed.baselines["flux"][0] == pytest.approx(frames.mean(), rel=0.01)


def test_rare_core_pixels_are_sampled():
    counts = patterns(4).astype(np.float32)
    sample = sample_pixels(counts, np.ones(counts.shape, bool), counts.mean(), 4000, np.random.default_rng(0))
    brightest = np.sort(counts[0], axis=None)[-50]
    assert (sample[:, FEATURES.index("intensity")] >= brightest).mean() > 3 * 50 / counts[0].size


def test_a_feature_that_is_the_same_everywhere_is_switched_off():
    sample = np.random.default_rng(0).normal(size=(3000, 9)).astype(np.float32)
    sample[:, 4] = 7.0
    grown = grow_classes(sample, TrainSettings(classes=3, som_side=4))
    assert grown.feature_scale[4] == 0
    assert np.isfinite(grown.centroids).all()


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(ValueError, match="no frame holds a photon"):
        grow_prior(np.zeros((3, 40, 40), np.uint16), settings=QUICK)
    with pytest.raises(ValueError, match="needs 2 frames bright enough to learn from, found 1 among 5"):
        grow_prior(np.concatenate([patterns(1, 40), np.zeros((4, 40, 40), np.uint32)]), settings=QUICK)
    with pytest.raises(ValueError, match=r"\(N, rows, columns\)"):
        grow_prior(np.zeros((40, 40), np.uint16))
    with pytest.raises(ValueError, match=r"\(N, rows, columns\)"):
        grow_prior(np.zeros((0, 40, 40), np.uint16))
    with pytest.raises(ValueError, match="the geometry was made for"):
        grow_prior(np.ones((2, 40, 40), np.uint16), geometry=Geometry((50, 50), (25, 25), (40, 40)))


def test_a_given_geometry_is_kept():
    frames = patterns(6)
    geometry = Geometry((96, 96), (50, 47), (64, 64))
    prior = grow_prior(frames, geometry=geometry, settings=QUICK)
    assert prior.geometry == geometry
    assert prior.reference.shape == (64, 64)
    assert replace(prior, geometry=geometry).content_hash == prior.content_hash


def test_masked_pixels_are_invalid_in_the_prior_and_a_dark_is_subtracted_before_anything_is_learnt() -> None:
    frames = diffraction((48, 48), count=12, photons=2e5)
    mask = np.zeros((48, 48), bool)
    mask[5, 7] = True
    dark = np.full((48, 48), 3, np.float32)
    plain = grow_prior(frames, settings=QUICK)
    corrected = grow_prior(frames + np.uint16(3), settings=QUICK, corrections=Corrections(mask=mask, dark=dark))
    assert corrected.invalid[5, 7]
    assert not plain.invalid[5, 7]
    assert corrected.normaliser == pytest.approx(plain.normaliser, rel=0.01)


def test_a_good_rocking_curve_raises_no_alarm_on_frames_the_prior_never_saw(grown, data_folder) -> None:
    prior, _ = grown
    with h5py.File(data_folder / "bcdi_gold_rocking_curve.cxi") as file:
        unseen = file[DATA][1::2]
    recipe = make_recipe(prior, iterations=50)
    watch = recipe.watches()[0]
    frames = [make_frame(counts, i) for i, counts in enumerate(unseen)]
    alarmed = {result.index: result.alarms for result in watch(think(recipe.stages(), prior, make_run(), frames)) if result.alarms}
    assert not alarmed


def test_several_files_teach_as_one(tmp_path) -> None:
    frames = patterns(8)
    for name, part in (("a.npy", frames[:5]), ("b.npy", frames[5:])):
        np.save(tmp_path / name, part)
    together = open_recordings([tmp_path / "a.npy", tmp_path / "b.npy"])
    assert (len(together), together.shape, together.name) == (8, frames.shape, "a.npy, b.npy")
    assert grow_prior(together, settings=QUICK).content_hash == grow_prior(frames, settings=QUICK).content_hash
    with pytest.raises(IndexError):
        together[8]


def test_the_slice_is_taken_of_each_file(tmp_path) -> None:
    frames = patterns(7)
    for name, part in (("a.npy", frames[:4]), ("b.npy", frames[4:])):
        np.save(tmp_path / name, part)
    together = open_recordings([tmp_path / "a.npy", tmp_path / "b.npy"], "1::2")
    np.testing.assert_array_equal(np.stack([together[i] for i in range(len(together))]), frames[[1, 3, 5]])


def test_what_any_file_masks_is_masked(tmp_path) -> None:
    for k, name in enumerate(("a.cxi", "b.cxi", "c.cxi")):
        with h5py.File(tmp_path / name, "w") as file:
            file[DATA] = np.ones((2, 4, 5), np.uint16)
            if k < 2:
                file[DATA.replace("data", "mask")] = np.arange(20).reshape(4, 5) == k
    geometry = open_recordings([tmp_path / name for name in ("a.cxi", "b.cxi", "c.cxi")]).geometry
    assert np.flatnonzero(geometry.mask).tolist() == [0, 1]


def test_files_that_do_not_go_together_are_refused_by_name(tmp_path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 40, 40), np.uint16))
    np.save(tmp_path / "b.npy", np.ones((3, 40, 48), np.uint16))
    with pytest.raises(ConfigError, match=r"a\.npy has frames of 40 x 40, .*b\.npy of 40 x 48"):
        open_recordings([tmp_path / "a.npy", tmp_path / "b.npy"])
    with pytest.raises(ConfigError, match="named twice"):
        open_recordings([tmp_path / "a.npy", tmp_path / "a.npy"])


def test_the_command_trains_on_several_files_and_replaces_a_prior_only_when_told(tmp_path) -> None:
    def train(*words):
        return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, ["train", *map(str, words)])

    frames = diffraction((48, 48), count=12, photons=2e5)
    np.save(tmp_path / "a.npy", frames[:6])
    np.save(tmp_path / "b.npy", frames[6:])
    words = (tmp_path / "a.npy", tmp_path / "b.npy", "-o", tmp_path / "prior.h5")
    said = train(*words)
    assert said.exit_code == 0, said.output
    assert sp.load_prior(tmp_path / "prior.h5").provenance["files"] == ["a.npy", "b.npy"]
    for number in ("adjusted Rand index", "quantisation error", "topographic error"):
        assert number in said.output
    before = (tmp_path / "prior.h5").read_bytes()
    refused = train(*words, "--seed", 1)
    assert refused.exit_code == 2
    assert "--force" in refused.output
    assert (tmp_path / "prior.h5").read_bytes() == before
    assert train(*words, "--seed", 1, "--force").exit_code == 0
    assert (tmp_path / "prior.h5").read_bytes() != before
