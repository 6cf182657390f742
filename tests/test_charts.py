"""The EWMA chart: beside an obvious version, beside published run lengths, and beside frames that were drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streamprior.stages.charts import Ewma, limit_for, run_length, spread


def naive(scores: np.ndarray, weight: float) -> list[float]:
    """The chart of one signal as the textbook has it: a mean, and the variance of its weights."""
    charted = []
    for t in range(1, len(scores) + 1):
        weights = weight * (1 - weight) ** np.arange(t - 1, -1, -1)
        charted.append(float(weights @ scores[:t] / np.sqrt((weights**2).sum())))
    return charted


@pytest.mark.parametrize("weight", [0.05, 0.2, 1.0])
def test_a_chart_is_what_the_textbook_says_however_the_frames_are_batched(weight: float) -> None:
    scores = np.random.default_rng(1).normal(0.3, 1, (50, 3))
    whole, parts = Ewma(3, weight), Ewma(3, weight)
    chart = whole(scores)
    for signal in range(3):
        np.testing.assert_allclose(chart[:, signal], naive(scores[:, signal], weight), rtol=1e-12)
    np.testing.assert_array_equal(chart, np.concatenate([parts(scores[:1]), parts(scores[1:30]), parts(scores[30:])]))


def test_a_frame_without_a_score_says_nothing_for_or_against() -> None:
    scores = np.random.default_rng(2).normal(0, 1, (20, 1))
    gaps = np.insert(scores, [3, 3, 10], [[np.nan], [np.inf], [np.nan]], axis=0)
    with_gaps = Ewma(1)(gaps)
    known = np.isfinite(gaps[:, 0])
    assert np.isnan(with_gaps[~known]).all()
    np.testing.assert_array_equal(with_gaps[known], Ewma(1)(scores))


def test_a_new_run_knows_nothing_of_the_one_before() -> None:
    chart = Ewma(1)
    chart(np.full((10, 1), 9.0))
    chart.begin()
    assert chart(np.ones((1, 1))).item() == pytest.approx(1.0)


def test_run_lengths_are_those_of_lucas_and_saccucci() -> None:
    """Table 3 of their paper: limits for a run length of 500."""
    for weight, limit in ((0.1, 2.814), (0.2, 2.962), (0.4, 3.054), (0.5, 3.071)):
        assert run_length(limit, weight) == pytest.approx(500, rel=0.01)


def test_a_weight_of_one_is_the_score_itself() -> None:
    beyond = math.erfc(3 / math.sqrt(2))
    assert run_length(3.0, 1.0) == pytest.approx(1 / beyond, rel=1e-6)


def test_the_limit_gives_as_many_false_alarms_as_was_wanted() -> None:
    limit = limit_for(10_000)
    assert limit == pytest.approx(3.835, abs=0.002)
    assert run_length(limit) == pytest.approx(10_000, rel=1e-3)
    quiet = Ewma(40)(np.random.default_rng(3).normal(0, 1, (20_000, 40)))
    beyond = np.abs(quiet) > limit
    # An alarm lasts some frames: what is counted is how often one begins.
    begun = int((beyond[1:] & ~beyond[:-1]).sum())
    assert 80 * 0.6 < begun < 80 * 2.5, "800,000 frames: 80 wanted, and a chart that comes back may begin again at once"


@pytest.mark.parametrize(("shift", "frames"), [(1.0, 21.7), (2.0, 5.3), (3.0, 3.1)])
def test_a_lasting_shift_is_found_as_soon_as_the_chain_foretells(shift: float, frames: float) -> None:
    limit = limit_for(10_000)
    assert run_length(limit, shift=shift) == pytest.approx(frames, rel=0.02)
    # A chart that has run for a while when the shift comes, 500 of them.
    scores = np.random.default_rng(4).normal(0, 1, (400, 500))
    scores[50:] += shift
    chart = np.abs(Ewma(500)(scores))[50:] > limit
    assert chart.any(axis=0).all()
    assert float(np.mean(chart.argmax(axis=0) + 1)) == pytest.approx(frames, rel=0.08)


def test_a_few_wild_frames_do_not_widen_a_quiet_stretch() -> None:
    scores = np.random.default_rng(5).normal(7, 2, 2000)
    scores[::100] = 1e6
    scores[1] = np.nan
    centre, deviation = spread(scores)
    assert (centre, deviation) == (pytest.approx(7, abs=0.2), pytest.approx(2, rel=0.08))
    with pytest.raises(ValueError, match="no quiet stretch"):
        spread([1.0] * 19 + [math.nan])


@pytest.mark.parametrize("weight", [0.0, -0.1, 1.1])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight is"):
        Ewma(1, weight)


@pytest.mark.parametrize("frames", [1, 1e7])
def test_a_limit_that_cannot_be_had_is_refused(frames: float) -> None:
    with pytest.raises(ValueError, match="frames is"):
        limit_for(frames)
