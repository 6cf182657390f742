"""The frozen prior on disk: everything the stages need to know of a sample's earlier frames, in one hashed HDF5 file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from streamprior.errors import PriorError

FORMAT = "streamprior-prior"
FORMAT_VERSION = 2

FEATURES = (
    "intensity",
    "log_intensity",
    "local_mean_3x3",
    "local_std_5x5",
    "laplacian",
    "gradient_magnitude",
    "radius",
    "angle",
    "gaussian_residual",
)
"""The nine pixel features, in the order of every (9,) array of a prior."""


@dataclass(frozen=True)
class Geometry:
    """Which pixels of the detector become the prepared frame.

    detector_shape : (rows, columns) of a frame as the detector gives it.
    centre : (row, column) of the detector pixel that becomes (H//2, W//2).
    shape : (H, W) of the prepared frame, after binning.
    binning : detector pixels per prepared pixel along each axis; binned counts are summed.
    """

    detector_shape: tuple[int, int]
    centre: tuple[int, int]
    shape: tuple[int, int]
    binning: int = 1


@dataclass(frozen=True, eq=False)
class Library:
    """Complex prototypes: objects solved on Set 1, each brought to one canonical frame. N training frames, U prototypes, C cells.

    psi : (U, H, W) or (U, D, H, W) complex64, centred, sum |psi|^2 = 1; its own shape is that of the prepared frames or volumes.
    support : (U, ...) bool, where the object was found. control : (...) bool, where any of them may be: the support of a flat start.
    place : (U, 2) int32, row and column of its unit on the frame SOM. members : (U,) int32, training frames that it stands for.
    coherence : (U,) float32, |<psi>| / <|psi|> of its members after alignment; 1 for a single one.
    patterns : (N, C) float32, sqrt of the training frames' counts in cells of `cell` pixels a side. unit : (N,) int32, prototype of each.
    gate : percentile of the training frames' distances to their nearest prototype but their own; a frame beyond it is strange.
    """

    psi: npt.NDArray[np.complex64]
    support: npt.NDArray[np.bool_]
    control: npt.NDArray[np.bool_]
    place: npt.NDArray[np.int32]
    members: npt.NDArray[np.int32]
    coherence: npt.NDArray[np.float32]
    patterns: npt.NDArray[np.float32]
    unit: npt.NDArray[np.int32]
    cell: int
    gate: float


@dataclass(frozen=True, eq=False)
class Prior:
    """Frozen knowledge. Arrays are read-only; `content_hash` covers every field but `provenance`.

    Pixel classes (docs/physics.md: features -> standardise -> PCA -> nearest centroid), with D = 9 features, P components, K classes:

    normaliser : mean photons per valid pixel of a typical training frame. A frame is scaled by normaliser / its own mean
        before features are computed, so that classes hold when the dose changes.
    feature_mean, feature_scale : (D,) float32; the scaled feature is (x - mean) * scale, a scale of 0 switches a feature off.
    pca_components : (P, D) float32, rows orthonormal; centroids : (K, P) float32, in canonical order (mean radius, then intensity).
    class_names : K names for people.
    reference : (H, W) uint8, class map of the mean training frame; background of every IoU.

    Retrieval: support : (H, W) bool, centred, of the flat start. invalid : (H, W) bool, pixels found unusable in training (prepared frame).
    library : the complex prototypes; None in a prior of pixel classes alone.

    baselines : name -> (mean, standard deviation) on the training frames: flux, chi2, chi2_over_floor, class_distance, centre_row,
        centre_column, ...; flux_least holds the faintest training frame's flux, below which masks and chi2 are not judged.
    training : what a person needs to overrule the choices: elbow curve, silhouettes, SOM codebook, explained variance (arrays);
        frame_hashes (N, 8) uint8, the frames it was grown on.
    provenance : where it came from (files, frames, settings, version, time); not part of the hash.
    """

    geometry: Geometry
    normaliser: float
    feature_mean: npt.NDArray[np.float32]
    feature_scale: npt.NDArray[np.float32]
    pca_components: npt.NDArray[np.float32]
    centroids: npt.NDArray[np.float32]
    class_names: tuple[str, ...]
    reference: npt.NDArray[np.uint8]
    support: npt.NDArray[np.bool_]
    invalid: npt.NDArray[np.bool_]
    library: Library | None = None
    baselines: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    training: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    content_hash: str = ""

    @property
    def background(self) -> int | None:
        """Class id of the background; None in a prior that names none."""
        return self.class_names.index("background") if "background" in self.class_names else None

    @cached_property
    def object_box(self) -> tuple[slice, slice]:
        """Rows and columns that every stored object is cropped to: the bounding box of all supports, 4 pixels wider on each side."""
        inside = self.support if self.library is None else self.support | self.library.support.any(0)
        rows, columns = np.nonzero(inside)
        if rows.size == 0:
            return slice(0, self.support.shape[0]), slice(0, self.support.shape[1])
        height, width = self.support.shape
        return (
            slice(max(0, int(rows.min()) - 4), min(height, int(rows.max()) + 5)),
            slice(max(0, int(columns.min()) - 4), min(width, int(columns.max()) + 5)),
        )


_ARRAYS = ("feature_mean", "feature_scale", "pca_components", "centroids", "reference", "support", "invalid")
_LIBRARY = ("psi", "support", "control", "place", "members", "coherence", "patterns", "unit")


def freeze(prior: Prior) -> Prior:
    """The same prior with its content hash filled in and its arrays read-only."""
    arrays: dict[str, Any] = {name: np.ascontiguousarray(getattr(prior, name)) for name in _ARRAYS}
    training = {name: np.ascontiguousarray(prior.training[name]) for name in sorted(prior.training)}
    library = prior.library
    if library is not None:
        stored: dict[str, Any] = {name: np.ascontiguousarray(getattr(library, name)) for name in _LIBRARY}
        library = replace(library, **stored)
    for array in (*arrays.values(), *training.values(), *_arrays_of(library).values()):
        array.flags.writeable = False
    frozen = replace(prior, training=training, library=library, **arrays)
    return replace(frozen, content_hash=_content_hash(frozen))


def _arrays_of(library: Library | None) -> dict[str, npt.NDArray[Any]]:
    return {} if library is None else {f"library/{name}": getattr(library, name) for name in _LIBRARY}


def _content_hash(prior: Prior) -> str:
    digest = hashlib.sha256(f"{FORMAT} {FORMAT_VERSION}".encode())
    plain = {
        "geometry": [prior.geometry.detector_shape, prior.geometry.centre, prior.geometry.shape, prior.geometry.binning],
        "normaliser": float(prior.normaliser),
        "class_names": prior.class_names,
        "baselines": {name: prior.baselines[name] for name in sorted(prior.baselines)},
        "library": None if prior.library is None else [int(prior.library.cell), float(prior.library.gate)],
    }
    digest.update(json.dumps(plain, sort_keys=True).encode())
    named = {name: getattr(prior, name) for name in _ARRAYS} | _arrays_of(prior.library)
    named |= {f"training/{name}": array for name, array in prior.training.items()}
    for name in sorted(named):
        array = np.ascontiguousarray(named[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_prior(prior: Prior, path: str | os.PathLike[str]) -> Prior:
    """Freeze the prior and write it; the file appears whole or not at all. Returns the frozen prior."""
    frozen = freeze(prior)
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        _write(frozen, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return frozen


def _write(frozen: Prior, path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["content_hash"] = frozen.content_hash
        file.attrs["normaliser"] = float(frozen.normaliser)
        file.attrs["class_names"] = json.dumps(frozen.class_names)
        file.attrs["features"] = json.dumps(FEATURES)
        file.attrs["baselines"] = json.dumps({name: list(pair) for name, pair in frozen.baselines.items()})
        file.attrs["provenance"] = json.dumps(dict(frozen.provenance), default=str)
        for one in fields(Geometry):
            file.attrs[f"geometry_{one.name}"] = getattr(frozen.geometry, one.name)
        for name in _ARRAYS:
            file.create_dataset(name, data=getattr(frozen, name))
        for name, array in frozen.training.items():
            file.create_dataset(f"training/{name}", data=array)
        if frozen.library is not None:
            for name, array in _arrays_of(frozen.library).items():
                # Mostly zeros outside the supports.
                file.create_dataset(name, data=array, compression="gzip", compression_opts=1)
            file["library"].attrs["cell"] = frozen.library.cell
            file["library"].attrs["gate"] = frozen.library.gate


def load_prior(path: str | os.PathLike[str]) -> Prior:
    """Read a prior and check its version and its hash.

    Raises
    ------
    PriorError
        The file is missing, truncated, no prior, of another format version, or its content does not match its hash.
    """
    try:
        with h5py.File(path, "r") as file:
            prior = _read(file, path)
            stored = str(file.attrs["content_hash"])
    except FileNotFoundError:
        raise PriorError(f"prior {path}: no such file; grow one with `streamprior train FILE -o {path}`") from None
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        # All of these come from h5py and json for a file with damaged bytes.
        raise PriorError(f"prior {path}: cannot be read ({error}); copy it again or grow a new one with `streamprior train`") from None
    frozen = freeze(prior)
    if frozen.content_hash != stored:
        raise PriorError(
            f"prior {path}: its content does not match its hash (stored {stored[:12]}, found {frozen.content_hash[:12]}); grow it again"
        )
    return frozen


def _read(file: h5py.File, path: str | os.PathLike[str]) -> Prior:
    if file.attrs.get("format") != FORMAT:
        raise PriorError(f"prior {path}: an HDF5 file, but not a prior; name the file that `streamprior train -o` wrote")
    version = int(file.attrs["format_version"])
    if version != FORMAT_VERSION:
        raise PriorError(
            f"prior {path}: format version {version}, this streamprior reads {FORMAT_VERSION}; grow it again with `streamprior train`"
        )

    def pair(name: str) -> tuple[int, int]:
        first, second = (int(value) for value in file.attrs[f"geometry_{name}"])
        return first, second

    return Prior(
        geometry=Geometry(pair("detector_shape"), pair("centre"), pair("shape"), int(file.attrs["geometry_binning"])),
        normaliser=float(file.attrs["normaliser"]),
        class_names=tuple(json.loads(file.attrs["class_names"])),
        baselines={name: (mean, deviation) for name, (mean, deviation) in json.loads(file.attrs["baselines"]).items()},
        library=_read_library(file),
        training={name: dataset[()] for name, dataset in file.get("training", {}).items()},
        provenance=json.loads(file.attrs["provenance"]),
        **{name: file[name][()] for name in _ARRAYS},
    )


def _read_library(file: h5py.File) -> Library | None:
    if "library" not in file:
        return None
    group = file["library"]
    return Library(**{name: group[name][()] for name in _LIBRARY}, cell=int(group.attrs["cell"]), gate=float(group.attrs["gate"]))


HASH_BYTES = 8
"""Two of a million different frames share 8 bytes of their digest with a chance of 3e-8."""


def frame_hashes(counts: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """(B, 8) uint8: first bytes of blake2b over each raw frame (little-endian float32), by which an evaluation finds leaks."""
    frames = np.ascontiguousarray(counts, np.dtype("<f4"))
    digests = [hashlib.blake2b(frame.tobytes(), digest_size=HASH_BYTES).digest() for frame in frames]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(frames), HASH_BYTES)
