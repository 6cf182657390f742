"""Settings of the training, each with its unit, its default and the reason of the default."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class TrainSettings(BaseModel):
    """How a prior is grown."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    classes: Annotated[int, Field(ge=2, le=49)] | None = None
    """Pixel classes. None: the elbow of the inertia, held within 3..7; 3 are expected on diffraction frames (background, ring, core)."""
    som_side: Annotated[int, Field(ge=3, le=20)] = 7
    """Units along each side of the pixel SOM: 49 are ten times the classes that come of them, and each still gets hundreds of pixels."""
    som_epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the sampled pixels. The codebook starts on the two main axes; on the measured rocking curve a second and a fourth
    pass left the quantisation error where it was (0.39, 0.40, 0.40)."""
    pixels: Annotated[int, Field(ge=1000)] = 40_000
    """Pixels sampled for the classes, over all frames and spread evenly over radius and intensity: a core has ten pixels in 16,000."""
    frames: Annotated[int, Field(ge=1)] = 64
    """Most frames that the classes, the reference map and the baselines are made from, evenly spaced over the useful ones."""
    survey: Annotated[int, Field(ge=1)] = 256
    """Most frames that are looked at for the beam centre and for pixels that are hot or dead."""
    faintest: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Frames with less than this part of the 95th percentile's photons teach nothing: on the measured rocking curve it keeps the flanks of
    the peak and leaves out the frames that are noise."""
    variance: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Part of the scaled features' variance that the projection keeps."""
    shape: Annotated[int, Field(ge=16)] | None = None
    """Rows and columns of the prepared frame. None: a detector of at most 128 pixels a side is kept whole, of a larger one the largest
    square up to 128 whose side is even and a product of 2, 3, 5 and 7, where FFTs are quick."""
    binning: Annotated[int, Field(ge=1)] = 1
    """Detector pixels per prepared pixel along each axis."""
    solved: Annotated[int, Field(ge=1)] = 8
    """Brightest frames that are solved for their support, which is then put to the vote."""
    schedule: str = "40*HIO+10*ER+SW(3.0)+40*HIO+10*ER+SW(2.5)+40*HIO+10*ER+SW(2.0)+40*HIO+20*ER+SW(1.5)+20*ER"
    """Steps of these solves; shrink-wrap falls from 3 px as Marchesini 2003 has it."""
    control: Annotated[int, Field(ge=1)] = 24
    """Frames that are refined from a flat start in the support, for the baseline of chi2."""
    iterations: Annotated[int, Field(ge=1)] = 50
    """Error-reduction iterations of that baseline: the same number the daemon runs by default."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of every random choice; the same frames and settings give the same prior, bit for bit."""
