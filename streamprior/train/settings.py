"""Settings of the training, each with its unit, its default and the reason of the default."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class TrainSettings(BaseModel):
    """How a prior is grown."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    classes: Annotated[int, Field(ge=2, le=49)] | None = None
    """Pixel classes. None: three (background, ring, core), which diffraction frames show, unless the elbow of the inertia asks for up to
    seven and the silhouette gains by them."""
    som_side: Annotated[int, Field(ge=4, le=20)] = 7
    """Units along each side of the pixel SOM: 49 are ten times the classes that come of them, and each still gets hundreds of pixels. Fewer
    than 4 a side would not reach the elbow curve's ten classes."""
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
    curvature: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Weight of Laplacian and Gaussian residual beside the other features. At 1 their signs split the ring of the measured Siemens star
    into salt and pepper (1.7 % of lonely pixels against 0.2 %), and three classes of a simulated crystal's frames were not found again in
    the other half (ARI 0.51 against 0.98); at 0 there is no more to gain (docs/decisions/0010)."""
    shape: Annotated[int, Field(ge=16)] | None = None
    """Rows and columns of the prepared frame. None: a detector of at most 128 pixels a side is kept whole, of a larger one the largest
    square up to 128 whose side is even and a product of 2, 3, 5 and 7, where FFTs are quick."""
    binning: Annotated[int, Field(ge=1)] = 1
    """Detector pixels per prepared pixel along each axis."""
    library: Annotated[int, Field(ge=0)] = 512
    """Most frames that are solved for the library of prototypes, evenly spaced over the useful ones; 0: no library."""
    starts: Annotated[int, Field(ge=1)] = 8
    """Random starts of each solve. On simulated crystals the median object error of the best of 1 / 2 / 4 / 8 / 16 was 0.22, 0.16, 0.16,
    0.14, 0.13."""
    schedule: str = (
        "40*HIO+10*ER+SW(3.0,0.1)+40*HIO+10*ER+SW(2.8,0.1)+40*HIO+10*ER+SW(2.6,0.1)+40*HIO+10*ER+SW(2.4,0.1)"
        "+40*HIO+10*ER+SW(2.2,0.1)+40*HIO+10*ER+SW(2.0,0.1)+40*HIO+10*ER+SW(1.8,0.1)+40*HIO+10*ER+SW(1.6,0.1)"
        "+40*HIO+10*ER+SW(1.4,0.1)+40*HIO+10*ER+SW(1.3,0.1)+40*HIO+10*ER+SW(1.1,0.1)+40*HIO+10*ER+SW(1.0,0.1)+50*ER"
    )
    """Steps of these solves, 650 iterations; shrink-wrap falls from 3 px to 1 px as Marchesini 2003 has it."""
    neighbours: Annotated[int, Field(ge=0)] = 4
    """Solved objects of other frames that each frame is solved from once more. On 280 simulated crystals it took the library's object error
    from 0.133 to 0.122 (median) and from 0.33 to 0.22 (75th percentile)."""
    polish: str = "10*ER+SW(1.5,0.1)+30*HIO+10*ER+SW(1.5,0.1)+30*HIO+10*ER+SW(1.0,0.1)+30*ER"
    """Steps from a neighbour's object."""
    coherence: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Least overlap |<a, b>| / (|a| |b|), aligned, of objects that are averaged to one prototype."""
    gate: Annotated[float, Field(gt=0, le=100)] = 99.0
    """Percentile of the training frames' distances from their nearest prototype but their own; a frame beyond it is not started from a
    prototype."""
    control: Annotated[int, Field(ge=1)] = 24
    """Frames that are refined as the daemon would refine them, had it not been trained on them, for the baselines of chi2 and distance."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of every random choice; the stability is judged with the seeds that follow it. The same frames and settings give the same prior, bit
    for bit."""
