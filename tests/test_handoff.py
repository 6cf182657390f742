"""Hand-off: cohere continues from our object, and a CXI file holds what PyNX looks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import streamprior as sp
from streamprior.errors import ConfigError
from streamprior.evaluate.handoff import Handoff, archived_start, write_cohere, write_cxi
from streamprior.evaluate.metrics import model_of
from streamprior.prior import Prior, save_prior
from streamprior.records import Detector, Photons, Result
from streamprior.sinks.archive import Archive, ArchivedRun, read_run, run_folders
from streamprior.sources.files import open_recording
from tests.builders import diffraction, make_run, small_prior
from tests.test_cli import streamprior


def solved(prior: Prior, counts: np.ndarray, valid: np.ndarray | None = None, iterations: int = 20) -> tuple[Photons, Any]:
    photons = Photons(
        counts.astype(np.float32), np.ones(counts.shape[1:], bool) if valid is None else valid, np.zeros(len(counts), np.uint32)
    )
    start = sp.match(photons, prior)
    return photons, sp.refine(photons, start, iterations=iterations)


def continued(folder: Path, iterations: int) -> list[float]:
    """The error of every iteration of cohere's own ER, started from the folder."""
    phasing = pytest.importorskip("cohere_core.controller.phasing", exc_type=ImportError)
    params = {
        "algorithm_sequence": f"{iterations}*ER",
        "init_guess": "continue",
        "continue_dir": str(folder),
        "initial_support_area": (0.5, 0.5),
    }
    work = phasing.create_rec(params, str(folder / "data.tif"), "np", -1, debug=True)
    assert work is not None
    assert work.iterate() == 0
    return list(work.errs)


def test_cohere_continues_where_we_stopped(tmp_path: Path) -> None:
    prior = small_prior()
    photons, result = solved(prior, diffraction(count=1))
    write_cohere(tmp_path, Handoff(result.psi[0], result.support[0], photons.counts[0]))
    ours = sp.refine(photons, result.psi, result.support, iterations=9)
    errors = continued(tmp_path, 10)
    assert errors[0] == pytest.approx(float(result.chi2[0]), rel=1e-4), "its first error is our last"
    assert errors[1:] == pytest.approx(list(ours.history[0]), rel=1e-3), "and it goes on as we would have gone on"


def test_cohere_continues_on_a_measured_frame(tmp_path: Path, data_folder: Path) -> None:
    with h5py.File(data_folder / "bcdi_gold_rocking_curve.cxi") as file:
        frame = file["entry_1/instrument_1/detector_1/data"][101, 64:192, 64:192]
    rows, columns = np.unravel_index(frame.argmax(), frame.shape)
    counts = np.roll(frame, (64 - rows, 64 - columns), (0, 1))[None]
    support = np.zeros((128, 128), bool)
    support[48:80, 48:80] = True
    photons, result = solved(replace(small_prior((128, 128)), support=support), counts)
    write_cohere(tmp_path, Handoff(result.psi[0], result.support[0], photons.counts[0]))
    assert continued(tmp_path, 1)[0] == pytest.approx(float(result.chi2[0]), rel=1e-4)


def test_pixels_that_were_not_measured_cost_cohere_nothing_at_the_start(tmp_path: Path) -> None:
    prior = small_prior()
    valid = np.ones((32, 32), bool)
    valid[15:18, 15:18] = False
    photons, result = solved(prior, diffraction(count=1), valid)
    write_cohere(tmp_path, Handoff(result.psi[0], result.support[0], photons.counts[0], valid))
    magnitude = np.sqrt(photons.counts[0])
    model = model_of(result.psi[0])
    wanted = np.sum((model - magnitude)[valid] ** 2) / (np.sum(magnitude[valid] ** 2) + np.sum(model[~valid] ** 2))
    assert continued(tmp_path, 1)[0] == pytest.approx(float(wanted), rel=1e-4)


def test_without_the_conjugation_the_twin_would_be_handed_over(tmp_path: Path) -> None:
    _, result = solved(small_prior(), diffraction(count=1))
    write_cohere(tmp_path, Handoff(result.psi[0], result.support[0]))
    image = np.load(tmp_path / "image.npy")
    np.testing.assert_allclose(np.abs(np.fft.ifftn(image)) * image.size, np.abs(np.fft.fftn(result.psi[0], norm="ortho")), atol=1e-3)
    assert not np.allclose(np.abs(np.fft.fftn(image)), np.abs(np.fft.ifftn(image)) * image.size, rtol=1e-2)
    assert not (tmp_path / "data.tif").exists(), "no frame was given"


def test_a_cxi_file_holds_what_pynx_reads(tmp_path: Path) -> None:
    valid = np.ones((32, 32), bool)
    valid[3, 5] = False
    photons, result = solved(small_prior(), diffraction(count=1), valid)
    about = Detector(shape=(32, 32), pixel_m=55e-6, distance_m=0.5, energy_ev=9000.0)
    file = write_cxi(tmp_path / "new" / "frame.cxi", Handoff(result.psi[0], result.support[0], photons.counts[0], valid, about))
    with h5py.File(file) as cxi:
        np.testing.assert_array_equal(cxi["entry_1/image_1/data"][()], result.psi[0])
        np.testing.assert_array_equal(cxi["entry_1/image_1/mask"][()] > 0, result.support[0])
        np.testing.assert_array_equal(cxi["entry_1/image_1/support"][()], cxi["entry_1/image_1/mask"][()])
        assert cxi["entry_1/instrument_1/detector_1/mask"][3, 5] == 1
        assert cxi["entry_1/instrument_1/detector_1/mask"][()].sum() == 1
        assert cxi["entry_1/instrument_1/source_1/energy"][()] == pytest.approx(9000 * 1.602176634e-19)
        np.testing.assert_array_equal(cxi["entry_1/data_1/data"][valid], photons.counts[0][valid])
    assert [one.name for one in file.parent.iterdir()] == ["frame.cxi"]


def test_our_own_reader_opens_the_file_of_a_volume(tmp_path: Path) -> None:
    psi = np.ones((4, 8, 8), np.complex64)
    file = write_cxi(tmp_path / "volume.cxi", Handoff(psi, psi.real > 0, np.ones((4, 8, 8), np.float32)))
    assert open_recording(file).shape == (4, 8, 8)


def result_of(prior: Prior, index: int, psi: np.ndarray) -> Result:
    classes = np.zeros(prior.geometry.shape, np.uint8)
    numbers = {"class_distance": 1.0, "chi2": 0.1, "chi2_floor": 0.01, "r_factor": 0.1, "free_llk": 1.0, "distance": np.nan}
    return Result(
        "run-1",
        index,
        classes,
        psi[prior.object_box],
        np.zeros((1, 1), np.float32),
        0.0,
        None,
        None,
        None,
        unit=-1,
        arm="flat",
        flags=0,
        **numbers,
    )


def archived(folder: Path, prior: Prior, objects: np.ndarray) -> ArchivedRun:
    sink = Archive(folder, prior, {"prior_hash": prior.content_hash}, growth=lambda path: None)
    sink.open()
    run = make_run("run-1", len(objects), prior.geometry.shape)
    sink.begin(run)
    sink.write([result_of(prior, i, psi) for i, psi in enumerate(objects)])
    sink.close()
    return read_run(run_folders(folder)[0])


def test_an_archived_object_goes_back_to_its_place(tmp_path: Path) -> None:
    prior = small_prior()
    _, result = solved(prior, diffraction(count=2))
    run = archived(tmp_path, prior, result.psi)
    psi, support = archived_start(run, 1)
    np.testing.assert_array_equal(psi, result.psi[1])
    np.testing.assert_array_equal(support, result.support[1])


@pytest.mark.parametrize(("frame", "says"), [(7, "frames 0 to 1"), (-1, "frames 0 to 1"), (0, "no object was retrieved")])
def test_a_frame_that_cannot_be_handed_over_is_refused(tmp_path: Path, frame: int, says: str) -> None:
    prior = small_prior()
    run = archived(tmp_path, prior, np.zeros((2, 32, 32), np.complex64))
    with pytest.raises(ConfigError, match=says):
        archived_start(run, frame)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of four frames of which the third was never retrieved; its recording and its prior lie beside it."""
    prior = save_prior(small_prior(), tmp_path / "prior.h5")
    counts = diffraction(count=4)
    np.save(tmp_path / "scan.npy", counts)
    _, result = solved(prior, counts)
    result.psi[2] = 0
    archived(tmp_path / "archive", prior, result.psi)
    return run_folders(tmp_path / "archive")[0]


def test_export_writes_what_cohere_continues_from(run_folder: Path, tmp_path: Path) -> None:
    beside = ("--data", tmp_path / "scan.npy", "--prior", tmp_path / "prior.h5")
    said = streamprior("export", run_folder, "--frames", "::2", "-o", tmp_path / "out", *beside)
    assert said.exit_code == 0, said.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["frame-000000"], "the third was not retrieved"
    assert 'init_guess = "continue"' in said.output
    _, result = solved(small_prior(), diffraction(count=4))
    assert continued(tmp_path / "out" / "frame-000000", 1)[0] == pytest.approx(float(result.chi2[0]), rel=1e-4)


def test_export_writes_a_cxi_file_a_frame(run_folder: Path, tmp_path: Path) -> None:
    said = streamprior("export", run_folder, "--frames", "1:", "--format", "cxi", "-o", tmp_path / "out")
    assert said.exit_code == 0, said.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["frame-000001.cxi", "frame-000003.cxi"]
    with h5py.File(tmp_path / "out" / "frame-000003.cxi") as cxi:
        assert cxi["entry_1/data_1/data"].shape == (32, 32)
        assert "instrument_1" not in cxi["entry_1"], "no frame was given"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--frames", "9"), "frames 0 to 3"),
        (("--frames", "2"), "no object was retrieved"),
        (("--frames", "2:3"), "none of these 1 frames"),
        (("--frames", "a:b"), "neither an index nor a Python slice"),
        (("--frames", "0", "--format", "tiff"), "choose cohere or cxi"),
        (("--frames", "0", "--data", "scan.npy"), "give --data and --prior together"),
    ],
)
def test_export_refuses_with_a_remedy(run_folder: Path, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    said = streamprior("export", run_folder, "-o", tmp_path / "out", *words)
    assert said.exit_code == 2
    assert says in said.output
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_folder_without_a_run_and_another_runs_prior(run_folder: Path, tmp_path: Path) -> None:
    said = streamprior("export", tmp_path, "--frames", "0", "-o", tmp_path / "out")
    assert said.exit_code == 2
    assert "no archived run" in said.output
    save_prior(replace(small_prior(), normaliser=6.0), tmp_path / "other.h5")
    beside = ("--data", tmp_path / "scan.npy", "--prior", tmp_path / "other.h5")
    said = streamprior("export", run_folder, "--frames", "0", "-o", tmp_path / "out", *beside)
    assert said.exit_code == 2
    assert "the run was made with" in said.output
