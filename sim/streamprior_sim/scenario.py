"""A YAML file -> Scenario: everything that decides the twin's frames, checked, with units."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from streamprior.errors import ConfigError
from streamprior_sim.faults import check_kind
from streamprior_sim.wires import Wire

_FROZEN = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class CrystalSettings(BaseModel):
    """A faceted, strained crystal, turned through one Bragg peak (kind bragg)."""

    model_config = _FROZEN

    kind: Literal["bragg"]
    """Bragg coherent diffraction."""
    seed: int | None = None
    """The crystal's own seed; the scenario's where absent. Two scenarios with one crystal differ in their noise alone."""
    size_nm: float = Field(default=220.0, gt=0)
    """Mean distance between opposite {111} facets, nanometres; the measured crystal of APS 34-ID-C S0054 has about 200."""
    facet_spread: float = Field(default=0.2, ge=0, le=0.5)
    """How much the facets' distances from the centre differ, as a fraction of their mean; 0 is a regular truncated octahedron."""
    lattice_nm: float = Field(default=0.40782, gt=0)
    """Lattice constant, nanometres; gold at room temperature (CRC Handbook)."""
    hkl: tuple[int, int, int] = (1, 1, 1)
    """Miller indices of the peak, cubic lattice."""
    displacement_rms_nm: float = Field(default=0.03, ge=0)
    """Root mean square of the displacement along Q inside the crystal, nanometres; its mean and its linear part are zero."""
    correlation_nm: float = Field(default=60.0, gt=0)
    """Length over which the displacement changes, nanometres (sigma of a Gaussian)."""
    rocking_range_deg: float = Field(default=1.0, ge=0, le=10)
    """Turn of the crystal from the first frame to the last, degrees, the peak in its middle; 0 stays on the peak."""


class CollectionSettings(BaseModel):
    """Crystals of seven morphologies, another one on every frame (kind crystals); `streamprior_sim.crystals` says how they are made."""

    model_config = _FROZEN

    kind: Literal["crystals"]
    """Bragg coherent diffraction of many crystals, each at the top of its rocking curve."""
    seed: int | None = Field(default=None, ge=0)
    """The collection's own seed; the scenario's where absent. Another seed is another collection."""
    first: int = Field(default=0, ge=0)
    """Number of the crystal on frame 0; frame i shows crystal first + i, so that two runs of one collection need not share a crystal."""


class GoldBallSettings(BaseModel):
    """Ptychography of gold balls on a membrane (kind gold_balls)."""

    model_config = _FROZEN

    kind: Literal["gold_balls"]
    """Ptychography."""
    seed: int | None = None
    """The sample's own seed; the scenario's where absent."""
    data: Path | None = None
    """A published reconstruction (HDF5: object, probe, translation, basis) that replaces the synthetic sample; relative to the scenario."""
    ball_nm: float = Field(default=50.0, gt=0)
    """Diameter of a ball, nanometres."""
    clusters_per_um2: float = Field(default=8.0, ge=0)
    """Clusters per square micrometre of membrane."""
    balls_per_cluster: int = Field(default=12, ge=1, le=1000)
    """Mean number of balls in a cluster."""
    membrane_nm: float = Field(default=50.0, ge=0)
    """Thickness of the silicon nitride membrane, nanometres."""
    scan: Literal["raster", "fermat"] = "fermat"
    """Order of the positions: rows, or a Fermat spiral (Huang 2014), which has no raster's grid artefacts."""
    step_nm: float = Field(default=30.0, gt=0)
    """Distance between neighbouring positions, nanometres; 30 in CXIDB 65."""
    second_mode: float = Field(default=0.06, ge=0, lt=1)
    """Share of the photons in the second probe mode; 0.06 in the published reconstruction of CXIDB 65."""
    defocus_um: float = 1.2
    """Distance of the sample from the focus, micrometres: it widens the probe, so that neighbouring positions overlap."""
    defocus_um_per_frame: float = 0.0
    """Further distance from the focus with every frame, micrometres: a warming zone plate or sample changes the probe slowly."""
    subpixel: bool = False
    """Whether the stage goes to fractions of an object pixel; if not, a frame's patch is its truth without any interpolation."""
    jitter_nm: float = Field(default=0.0, ge=0, le=1000)
    """Where the beam is, against what the stage reports: rms along rows and along columns, nanometres, anew on every frame.
    Encoders and stages of scanning microscopes leave some nanometres, a laboratory's open-loop stage tens."""
    drift_nm_per_frame: tuple[float, float] = (0.0, 0.0)
    """Movement of the beam over the sample (rows, columns) that the stage does not report, nanometres per frame: heat expands a mount."""
    position_missing_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the frames for which the stage reports nothing: an encoder's messages get lost."""
    vibration_nm: float = Field(default=0.0, ge=0, le=30)
    """Movement of the beam during one exposure: rms along rows and along columns, nanometres. Three points an axis stand for it, which
    resolve no more than 30."""
    coherence_um: float = Field(default=0.0, ge=0)
    """Transverse coherence length xi at the sample, micrometres: the degree of coherence of two points r apart is exp(-r^2 / (2 xi^2)), the
    Gaussian Schell model (Vartanyants & Singer, New J. Phys. 12, 035004, 2010). It blurs the diffraction by a Gaussian of
    wavelength * distance / (2 pi xi) rms. 0 is full coherence of each mode."""


class DetectorSettings(BaseModel):
    """The detector and what is wrong with it."""

    model_config = _FROZEN

    shape: tuple[Annotated[int, Field(ge=16, le=4096)], Annotated[int, Field(ge=16, le=4096)]] = (128, 128)
    """(rows, columns)."""
    dtype: Literal["uint8", "uint16", "uint32"] = "uint16"
    """Type of a pixel; its maximum means "no data", as on every DECTRIS stream."""
    pixel_um: float = Field(default=55.0, gt=0)
    """Edge of a pixel, micrometres."""
    distance_m: float = Field(default=0.5, gt=0)
    """From the sample to the detector, metres."""
    dead: int = Field(default=0, ge=0)
    """Pixels that always read 0."""
    hot: int = Field(default=0, ge=0)
    """Pixels that read noise around hot_counts."""
    hot_counts: float = Field(default=5000.0, ge=0)
    """Mean reading of a hot pixel, counts."""
    unknown_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the dead and hot pixels that the detector's own mask does not know."""
    beam_stop_radius_px: float = Field(default=0.0, ge=0)
    """Radius of the beam stop around the frame's centre, pixels; in the detector's mask. 0 is none."""
    saturation_counts: int | None = Field(default=None, gt=0)
    """Counts from which a pixel reads the dtype's maximum; absent: the dtype's maximum itself."""
    background_photons: float = Field(default=0.0, ge=0)
    """Constant background, photons per pixel and frame."""
    gap_rows: tuple[tuple[int, int], ...] = ()
    """Gaps between modules: [first row, row after the last]; they read the dtype's maximum."""
    gap_columns: tuple[tuple[int, int], ...] = ()
    """The same along columns."""
    no_data_frames: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Frames whose every pixel reads the dtype's maximum: integers hold no NaN, and so a failed readout shows."""


class StepSettings(BaseModel):
    """Something that happens at one frame, and stays or passes."""

    model_config = _FROZEN

    frame: int = Field(ge=0)
    """First frame that shows it."""
    frames: int = Field(default=0, ge=0)
    """Frames that show it, for example a beam dump's with flux 0; 0 is all that follow."""
    centre_px: tuple[float, float] = (0.0, 0.0)
    """The beam jumps by (rows, columns), pixels."""
    flux: float = Field(default=1.0, ge=0)
    """The flux is multiplied by this."""
    hot_block: tuple[int, int] | None = None
    """(row, column) of the corner of a 4 x 4 block that turns hot; the detector's mask does not know."""


class DriftSettings(BaseModel):
    """How the beam changes while the run goes on."""

    model_config = _FROZEN

    start_frame: int = Field(default=0, ge=0)
    """Frames before it are quiet."""
    centre_px_per_frame: tuple[float, float] = (0.0, 0.0)
    """Movement of the beam (rows, columns), pixels per frame."""
    flux_per_frame: float = Field(default=0.0, gt=-1)
    """Relative change of the flux per frame, compounding: -0.01 loses one per cent a frame."""
    flux_rms: float = Field(default=0.0, ge=0, le=0.3)
    """Relative fluctuation of the flux from frame to frame, also in quiet frames."""
    steps: tuple[StepSettings, ...] = ()
    """Sudden changes."""


def _known_fault(kind: str) -> str:
    try:
        check_kind(kind)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return kind


class Scenario(BaseModel):
    """One experiment of the twin; the same scenario gives the same frames, by index."""

    model_config = _FROZEN

    name: str
    """Shown in the run's metadata."""
    seed: int = Field(default=0, ge=0)
    """Decides sample, bad pixels and noise."""
    frames: int = Field(ge=1, le=10_000_000)
    """Frames of the run."""
    rate_hz: float = Field(gt=0)
    """Frames a second on the wire."""
    dose_photons: float = Field(gt=0)
    """bragg: photons of the brightest frame; crystals: of every frame; gold_balls: of an empty beam. All without drift or stop."""
    energy_ev: float = Field(gt=0)
    """Photon energy, electronvolts."""
    sample: Annotated[CrystalSettings | CollectionSettings | GoldBallSettings, Field(discriminator="kind")]
    """What scatters; its `kind` says which experiment this is."""
    detector: DetectorSettings = DetectorSettings()
    """The detector and its faults."""
    drift: DriftSettings = DriftSettings()
    """What changes during the run."""
    wire: Wire = Wire()
    """What the detector speaks."""
    faults: dict[Annotated[str, AfterValidator(_known_fault)], Annotated[int, Field(ge=1)]] = {}
    """Kind of fault on the wire -> how many of it, on images drawn by `seed`; `streamprior twin --help` names the kinds."""


# Which model holds the keys below a name in an error's location.
_SECTIONS: Mapping[str | int, type[BaseModel]] = {
    "bragg": CrystalSettings,
    "crystals": CollectionSettings,
    "gold_balls": GoldBallSettings,
    "detector": DetectorSettings,
    "drift": DriftSettings,
    "steps": StepSettings,
    "wire": Wire,
}


def bundled() -> tuple[str, ...]:
    """Names of the scenarios that come with the twin."""
    folder = resources.files("streamprior_sim") / "scenarios"
    return tuple(sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".yaml")))


def load_scenario(name_or_path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Scenario:
    """Read a scenario.

    Parameters
    ----------
    name_or_path : name of a bundled scenario (`bundled()` lists them) or path of a YAML file.
    changes : dotted key -> value that replaces the file's, for example {"frames": 100, "sample.size_nm": 150}.

    Raises
    ------
    ConfigError
        No such scenario, no YAML, or a key that is unknown, missing or out of range; the text names file, key and remedy.
    """
    if str(name_or_path) in bundled():
        where = f"bundled scenario {name_or_path}"
        text = (resources.files("streamprior_sim") / "scenarios" / f"{name_or_path}.yaml").read_text("utf-8")
        folder = Path()
    else:
        where, folder = f"scenario {name_or_path}", Path(name_or_path).parent
        try:
            text = Path(name_or_path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: cannot be read ({error}); name a YAML file or one of {', '.join(bundled())}") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: no YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: holds no keys; a scenario needs at least name, frames, rate_hz, dose_photons, energy_ev and sample")
    for key, value in (changes or {}).items():
        _change(tree, key, value)
    scenario = _validated(tree, where)
    return _with_data_beside(scenario, folder)


def _change(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"change {key}: {section} is no section of this scenario")
        tree = inner
    tree[last] = value


def _validated(tree: dict[str, Any], where: str) -> Scenario:
    try:
        return Scenario.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(where, one) for one in error.errors(include_url=False))) from None


def _sentence(where: str, error: Any) -> str:
    location = error["loc"]
    key = ".".join(str(part) for part in location if part not in ("bragg", "crystals", "gold_balls"))
    if error["type"] != "extra_forbidden":
        return f"{where}: {key or 'scenario'}: {error['msg']} (found {error['input']!r})"
    model: type[BaseModel] = Scenario
    for part in location[:-1]:
        model = _SECTIONS.get(part, model)
    known = list(model.model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, 1, cutoff=0.5)
    return f"{where}: {key}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}")


def _with_data_beside(scenario: Scenario, folder: Path) -> Scenario:
    """A relative `sample.data` is looked for beside the scenario's file."""
    sample = scenario.sample
    if not isinstance(sample, GoldBallSettings) or sample.data is None:
        return scenario
    return scenario.model_copy(update={"sample": sample.model_copy(update={"data": folder / sample.data})})
