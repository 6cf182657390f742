"""What scientists look at: is the data good, does it look like the prior, is anything drifting."""

from __future__ import annotations

from dashboard_panels import BAD, GOOD, OK_AT_0, WARNING, Dashboard, Panel, stat, states

CALM_SIGMA = 10.0
"""Drift scores up to here are shown at least, twice the default limit; beyond, the axis grows."""

SCIENTISTS = Dashboard(
    "streamprior-scientists",
    "streamprior: scientists",
    "Is the data good, does it look like what the prior was trained on, is anything drifting. Numbers are those of the newest frame.",
    [
        (
            "Now",
            [
                stat(
                    "Drift alarms",
                    "Signals beyond their limit for drift.patience frames.",
                    "short",
                    "sum by (instance) (streamprior_drift_alarm{i})",
                    OK_AT_0,
                ),
                stat(
                    "Largest drift score",
                    "Of all signals, in standard deviations of the baseline, either way.",
                    "none",
                    "max by (instance) (abs(streamprior_drift_score{i}))",
                    ((None, GOOD), (5, BAD)),
                    decimals=1,
                ),
                stat(
                    "Mask and reference",
                    "IoU with the prior's reference, mean over the classes.",
                    "percentunit",
                    'avg by (instance) (streamprior_mask_iou{reference="prior", instance=~"$instance"})',
                    ((None, BAD), (0.5, WARNING), (0.8, GOOD)),
                    high=1,
                    decimals=0,
                ),
                stat(
                    "chi2 over its floor",
                    "1 and below: the object explains the frame as well as photon noise allows.",
                    "none",
                    "streamprior:chi2_over_floor{i}",
                    ((None, GOOD), (3, WARNING), (10, BAD)),
                    decimals=2,
                ),
                stat(
                    "Distance from the prior",
                    "Part of the newest frame that its nearest prototype leaves unexplained.",
                    "percentunit",
                    "streamprior_prior_distance{i}",
                    high=1,
                    decimals=0,
                ),
                stat(
                    "Resolution of the mosaic",
                    "Half period, by the halves' ring correlation; only with the recipe ptycho, and NaN before the first image.",
                    "m",
                    "streamprior_mosaic_resolution_metres{i}",
                ),
            ],
        ),
        (
            "Masks",
            [
                Panel(
                    "IoU with the reference, by class",
                    "Intersection over union of the newest mask and the prior's reference mask; NaN where a class is in neither.",
                    "percentunit",
                    [('streamprior_mask_iou{reference="prior", instance=~"$instance"}', "{{instance}} {{class}}")],
                    high=1,
                ),
                Panel(
                    "IoU with the frame before, by class",
                    "Intersection over union of the newest mask and the previous one; it falls where the sample or the beam leaps.",
                    "percentunit",
                    [('streamprior_mask_iou{reference="previous", instance=~"$instance"}', "{{instance}} {{class}}")],
                    high=1,
                ),
                Panel(
                    "Class distance",
                    "Mean quantisation distance: how far pixels are from the class they were given, in the units of the features.",
                    "none",
                    [("streamprior_class_distance{i}", "{{instance}}")],
                ),
            ],
        ),
        (
            "Reconstruction",
            [
                Panel(
                    "chi2 and its floor",
                    "Misfit of the newest reconstruction, and what photon noise alone makes of it.",
                    "none",
                    [("streamprior_chi2{i}", "{{instance}} chi2"), ("streamprior_chi2_floor{i}", "{{instance}} floor")],
                    bands="/floor/",
                ),
                Panel(
                    "chi2 over its floor",
                    "1 and below is as good as the light allows; a rise at constant light says that the model does not fit any more.",
                    "none",
                    [("streamprior:chi2_over_floor{i}", "{{instance}}")],
                    high=3,
                    firm=False,
                    steps=((None, GOOD), (3, WARNING), (10, BAD)),
                ),
                Panel(
                    "Distance from the prior",
                    "Part of the newest frame that its nearest prototype leaves unexplained; 1: nothing like it was trained on.",
                    "percentunit",
                    [("streamprior_prior_distance{i}", "{{instance}}")],
                    high=1,
                ),
                Panel(
                    "Starts kept",
                    "Share of frames by the start that was kept: a prototype's or the flat one; none: not refined.",
                    "percentunit",
                    [
                        (
                            "sum by (instance, arm) (rate(streamprior_arm_kept_total{i}[$__rate_interval])) / ignoring (arm) group_left "
                            "sum by (instance) (rate(streamprior_arm_kept_total{i}[$__rate_interval]))",
                            "{{instance}} {{arm}}",
                        )
                    ],
                    high=1,
                    width=12,
                ),
                Panel(
                    "No prototype near",
                    "Share of frames that no prototype was near to: they were started flat, and flagged.",
                    "percentunit",
                    [
                        (
                            "rate(streamprior_frames_abstained_total{i}[$__rate_interval]) / on (instance) "
                            "sum by (instance) (rate(streamprior_arm_kept_total{i}[$__rate_interval]))",
                            "{{instance}}",
                        )
                    ],
                    high=1,
                    width=12,
                ),
            ],
        ),
        (
            "Drift",
            [
                Panel(
                    "Drift scores and their limits",
                    "Deviation of each signal from the baseline, in its standard deviations. Dashed: drift.limit; beyond it for "
                    "drift.patience frames the alarm is raised.",
                    "none",
                    [
                        ("streamprior_drift_score{i}", "{{instance}} {{signal}}"),
                        ("streamprior_drift_limit{i}", "{{instance}} limit above"),
                        ("-streamprior_drift_limit{i}", "{{instance}} limit below"),
                    ],
                    low=-CALM_SIGMA,
                    high=CALM_SIGMA,
                    firm=False,
                    width=24,
                    height=10,
                    bands="/limit (above|below)/",
                ),
                states(
                    "Alarms",
                    "When each signal's alarm was raised and when it was withdrawn.",
                    [("streamprior_drift_alarm{i}", "{{instance}} {{signal}}")],
                    OK_AT_0,
                    ((0, "quiet"), (1, "alarm")),
                    high=1,
                    width=24,
                ),
            ],
        ),
        (
            "Mosaic (recipe ptycho)",
            [
                Panel(
                    "Resolution",
                    "Half period at which the halves' ring correlation falls below half a bit; NaN where not known.",
                    "m",
                    [("streamprior_mosaic_resolution_metres{i}", "{{instance}}")],
                ),
                Panel(
                    "Resolution in pixels",
                    "The same in pixels of the mosaic; also where the pixel's size is not known.",
                    "none",
                    [("streamprior_mosaic_resolution_pixels{i}", "{{instance}}")],
                ),
                Panel(
                    "Odd against even frames",
                    "Rms difference of the images from odd and from even frames, over the contrast.",
                    "percentunit",
                    [("streamprior_mosaic_disagreement{i}", "{{instance}}")],
                    high=1,
                    firm=False,
                ),
                Panel(
                    "chi2 of the mosaic",
                    "Of its prediction of the newest frames.",
                    "none",
                    [("streamprior_mosaic_chi2{i}", "{{instance}}")],
                ),
                Panel(
                    "Frames of the mosaic",
                    "By what became of them: in, or why not.",
                    "short",
                    [("streamprior_mosaic_frames{i}", "{{instance}} {{place}}")],
                    high=10,
                    firm=False,
                ),
                Panel(
                    "Passes",
                    "Passes of frames through the mosaic beyond the first of each.",
                    "short",
                    [("streamprior_mosaic_passes{i}", "{{instance}}")],
                    high=10,
                    firm=False,
                ),
                Panel(
                    "Size",
                    "Pixels of the newest mosaic, cropped to where light was.",
                    "short",
                    [("streamprior_mosaic_pixels{i}", "{{instance}}")],
                    high=1000,
                    firm=False,
                    width=12,
                ),
                Panel(
                    "Warnings",
                    "Sentences of warning that the newest mosaic carries; the live page and the archive spell them out.",
                    "short",
                    [("streamprior_mosaic_warnings{i}", "{{instance}}")],
                    high=1,
                    firm=False,
                    steps=OK_AT_0,
                    width=12,
                ),
            ],
        ),
    ],
)
