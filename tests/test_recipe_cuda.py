"""A recipe on a card: what the daemon does before it trusts one. The kernels run on the CPU where there is no card."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from streamprior.errors import ConfigError
from streamprior.records import Classes
from streamprior.stages.classify_cuda import CudaClassifier
from streamprior.stages.recipe import Recipe
from streamprior.stages.refine_cuda import CudaSolver
from tests.builders import make_recipe, small_prior
from tests.host_cuda import Card


def on_the_card() -> Recipe:
    return replace(make_recipe(small_prior()), backend="cuda")


def test_the_stages_are_those_of_the_card_and_agree_with_the_cpu(card: Card) -> None:
    recipe = on_the_card()
    owned = [value for stage in recipe.stages() for value in (stage, *vars(stage).values())]
    assert {CudaClassifier, CudaSolver} <= {type(value) for value in owned}
    recipe.warm_up()


def test_a_card_that_computes_wrongly_is_not_used(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    right = CudaClassifier.classes

    def wrong(self: CudaClassifier, counts: np.ndarray, valid: np.ndarray) -> Classes:
        found = right(self, counts, valid)
        return replace(found, ids=np.where(found.ids == 0, 1, found.ids).astype(np.uint8))

    monkeypatch.setattr(CudaClassifier, "classes", wrong)
    with pytest.raises(ConfigError, match=r"compute\.backend: the CUDA card gives .* set compute\.backend to cpu"):
        on_the_card().warm_up()


def test_a_card_that_has_no_room_or_fails_at_the_start_is_said_with_a_remedy(card: Card) -> None:
    card.room_bytes = 100
    with pytest.raises(ConfigError, match=r"compute\.backend: the CUDA card cannot compute \(Out of memory.*nvidia-smi.*to cpu"):
        on_the_card().warm_up()
    card.room_bytes, card.launches_left = np.inf, 5
    with pytest.raises(ConfigError, match="cudaErrorIllegalAddress"):
        on_the_card().warm_up()
