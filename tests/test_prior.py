"""The prior's file: what is written is read back, and what was damaged or is none is refused with a remedy."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from streamprior.errors import PriorError
from streamprior.prior import Geometry, Library, Prior, freeze, load_prior, save_prior
from streamprior.stages.match import MARGIN
from tests.builders import small_prior

LIBRARY = ("psi", "support", "control", "place", "members", "coherence", "patterns", "unit")
ARRAYS = ("feature_mean", "feature_scale", "pca_components", "centroids", "reference", "support", "invalid")


def full_prior() -> Prior:
    """Every field filled with something that could be mistaken."""
    random = np.random.default_rng(0)
    return small_prior(
        (16, 20),
        geometry=Geometry((64, 50), (30, 21), (16, 20), 2),
        invalid=random.random((16, 20)) < 0.1,
        reference=random.integers(0, 3, (16, 20)).astype(np.uint8),
        training={"elbow": np.array([3.0, 2.0, 1.5]), "codebook": random.random((4, 6)).astype(np.float32)},
        library=full_library(),
        provenance={"file": "scan.cxi", "frames": "0::2", "settings": {"seed": 3}},
    )


def full_library() -> Library:
    """Three prototypes of five frames, in other corners than the support's box."""
    random = np.random.default_rng(1)
    psi = (random.normal(size=(3, 16, 20)) + 1j * random.normal(size=(3, 16, 20))).astype(np.complex64)
    support = np.zeros((3, 16, 20), bool)
    support[:, 3:9, 5:16] = True
    return Library(
        psi=psi * support,
        support=support,
        control=support.any(0),
        place=np.array([[0, 1], [2, 0], [1, 1]], np.int32),
        members=np.array([1, 3, 1], np.int32),
        coherence=np.array([1, 0.97, 1], np.float32),
        patterns=random.random((5, 80)).astype(np.float32),
        unit=np.array([0, 1, 1, 1, 2], np.int32),
        cell=2,
        gate=99.0,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_prior(full_prior(), tmp_path / "prior.h5")
    return tmp_path / "prior.h5"


def test_what_is_saved_is_loaded(saved: Path) -> None:
    prior, loaded = full_prior(), load_prior(saved)
    for field in fields(Prior):
        before, after = getattr(prior, field.name), getattr(loaded, field.name)
        if field.name in ARRAYS:
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
        elif field.name == "training":
            assert before.keys() == after.keys()
            for name in before:
                np.testing.assert_array_equal(before[name], after[name])
        elif field.name == "library":
            assert (before.cell, before.gate) == (after.cell, after.gate)
            for name in LIBRARY:
                assert getattr(before, name).dtype == getattr(after, name).dtype
                np.testing.assert_array_equal(getattr(before, name), getattr(after, name), err_msg=name)
        else:
            assert before == after, field.name


def test_saving_returns_the_frozen_prior_and_the_same_content_has_the_same_hash(tmp_path: Path) -> None:
    thawed = replace(full_prior(), content_hash="")
    frozen = save_prior(thawed, tmp_path / "a.h5")
    assert len(frozen.content_hash) == 64
    assert frozen.content_hash == load_prior(tmp_path / "a.h5").content_hash == freeze(thawed).content_hash


def test_arrays_of_a_loaded_prior_cannot_be_written_to(saved: Path) -> None:
    loaded = load_prior(saved)
    kept = [getattr(loaded.library, name) for name in LIBRARY]
    for array in (*(getattr(loaded, name) for name in ARRAYS), *loaded.training.values(), *kept):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


@pytest.mark.parametrize("name", [*ARRAYS, "training"])
def test_one_other_number_in_any_array_is_another_hash(name: str) -> None:
    prior = full_prior()
    if name == "training":
        changed: Any = {"training": {**prior.training, "elbow": np.array([3.0, 2.0, 1.25])}}
    else:
        array = getattr(prior, name).copy()
        array.flat[-1] = not array.flat[-1] if array.dtype == bool else array.flat[-1] + 1
        changed = {name: array}
    assert freeze(replace(prior, **changed)).content_hash != prior.content_hash


@pytest.mark.parametrize("name", [*LIBRARY, "cell", "gate"])
def test_one_other_number_in_the_library_is_another_hash(name: str) -> None:
    library = full_library()
    value = getattr(library, name)
    if name in LIBRARY:
        value = value.copy()
        value.flat[-1] = not value.flat[-1] if value.dtype == bool else value.flat[-1] + 1
    else:
        value += 1
    assert freeze(replace(full_prior(), library=replace(library, **{name: value}))).content_hash != full_prior().content_hash


@pytest.mark.parametrize(
    "change",
    [
        {"normaliser": 5.5},
        {"library": None},
        {"class_names": ("core", "ring", "outside")},
        {"baselines": {"flux": (5.0, 1.0)}},
        {"geometry": Geometry((64, 50), (30, 22), (16, 20), 2)},
        {"geometry": Geometry((64, 50), (30, 21), (16, 20), 1)},
        {"training": {}},
        {"centroids": np.zeros((2, 3), np.float32)},
        {"centroids": full_prior().centroids.astype(np.float64)},
    ],
)
def test_anything_that_results_depend_on_is_in_the_hash(change: Any) -> None:
    assert freeze(replace(full_prior(), **change)).content_hash != full_prior().content_hash


def test_provenance_is_not_in_the_hash() -> None:
    assert freeze(replace(full_prior(), provenance={})).content_hash == full_prior().content_hash


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(PriorError, match=r"cannot be read .*streamprior train"):
        load_prior(saved)


def test_a_flipped_byte_is_refused_or_without_consequence(saved: Path) -> None:
    whole, prior = saved.read_bytes(), full_prior()
    refused = 0
    for position in np.random.default_rng(0).integers(0, len(whole), 150):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        saved.write_bytes(damaged)
        try:
            assert load_prior(saved).content_hash == prior.content_hash
        except PriorError:
            refused += 1
    assert refused > 10


def test_other_bytes_in_an_array_are_told_by_the_hash(saved: Path) -> None:
    with h5py.File(saved, "a") as file:
        file["centroids"][0, 0] += 1
    with pytest.raises(PriorError, match="does not match its hash"):
        load_prior(saved)


def test_a_prior_without_a_library_is_loaded_without_one(tmp_path: Path) -> None:
    plain = save_prior(replace(full_prior(), library=None), tmp_path / "plain.h5")
    loaded = load_prior(tmp_path / "plain.h5")
    assert loaded.library is None
    assert loaded.content_hash == plain.content_hash


def test_a_damaged_library_is_refused(saved: Path) -> None:
    with h5py.File(saved, "a") as file:
        file["library/psi"][0, 8, 10] += 1
    with pytest.raises(PriorError, match="does not match its hash"):
        load_prior(saved)
    with h5py.File(saved, "a") as file:
        del file["library"].attrs["cell"]
    with pytest.raises(PriorError, match="cannot be read"):
        load_prior(saved)


@pytest.mark.parametrize("part", ["library/patterns", "support", "centroids"])
def test_a_missing_part_is_refused(saved: Path, part: str) -> None:
    with h5py.File(saved, "a") as file:
        del file[part]
    with pytest.raises(PriorError, match="cannot be read"):
        load_prior(saved)


def test_another_format_version_is_refused_with_both_numbers(saved: Path) -> None:
    with h5py.File(saved, "a") as file:
        file.attrs["format_version"] = 3
    with pytest.raises(PriorError, match="format version 3, this streamprior reads 2; grow it again"):
        load_prior(saved)


def test_what_is_no_prior_is_said_so(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = [1, 2]
    with pytest.raises(PriorError, match="not a prior; name the file that `streamprior train -o` wrote"):
        load_prior(tmp_path / "other.h5")
    (tmp_path / "text.h5").write_text("prior")
    with pytest.raises(PriorError, match="cannot be read"):
        load_prior(tmp_path / "text.h5")
    with pytest.raises(PriorError, match="cannot be read"):
        load_prior(tmp_path)
    with pytest.raises(PriorError, match=r"missing\.h5: no such file; grow one with `streamprior train"):
        load_prior(tmp_path / "missing.h5")


def test_a_save_that_fails_leaves_the_old_prior_and_nothing_else(saved: Path) -> None:
    before = saved.read_bytes()
    unwritable = replace(full_prior(), training={"a": np.zeros(2), "a/b": np.zeros(2)})
    with pytest.raises(TypeError, match="already exists"):
        save_prior(unwritable, saved)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["prior.h5"]


def test_a_save_over_an_old_prior_replaces_it_whole(saved: Path) -> None:
    other = save_prior(small_prior(), saved)
    assert load_prior(saved).content_hash == other.content_hash != full_prior().content_hash
    assert [file.name for file in saved.parent.iterdir()] == ["prior.h5"]


def test_the_object_box_is_the_supports_and_four_pixels_more_within_the_frame() -> None:
    support = np.zeros((16, 20), bool)
    support[6:9, 2:17] = True
    plain = replace(full_prior(), library=None)
    assert replace(plain, support=support).object_box == (slice(2, 13), slice(0, 20))
    assert replace(plain, support=np.zeros((16, 20), bool)).object_box == (slice(0, 16), slice(0, 20))


def test_the_object_box_holds_every_prototype_as_refinement_may_widen_it() -> None:
    rows, columns = replace(full_prior(), support=np.zeros((16, 20), bool)).object_box
    assert (rows, columns) == (slice(0, 13), slice(1, 20))
    widened = np.stack([binary_dilation(one, iterations=MARGIN) for one in full_library().support])
    outside = np.ones((16, 20), bool)
    outside[rows, columns] = False
    assert not widened[:, outside].any()
