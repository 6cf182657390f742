"""Frames on their way to a card: gathered in page-locked memory, from where they travel while the CPU and the card go on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.arrays import page_locked


class Landing:
    """Owns an array on the card and the page-locked one that it is filled from: an item for each frame of a chunk, or
    one for all. number : of the items that it holds now.
    """

    def __init__(self, cupy: Any, shape: tuple[int, ...], kind: npt.DTypeLike) -> None:
        self._cupy, self._kind = cupy, kind
        self.number = 0
        self._make((1, *shape))

    def _make(self, shape: tuple[int, ...]) -> None:
        self.host = page_locked(self._cupy, shape, self._kind)
        self.card = self._cupy.empty(shape, self._kind)

    def holding(self, number: int) -> npt.NDArray[Any]:
        """The page-locked items, to be filled; the chunk before must have left."""
        if len(self.host) < number:
            self._make((power_of_two(number), *self.host.shape[1:]))
        self.number = number
        return self.host[:number]

    def send(self, stream: Any) -> None:
        self.card[: self.number].set(self.host[: self.number], stream)


def map_apart(landing: Landing, pixels: np.int32) -> np.int32:
    """Pixels between one frame's map and the next one's, 0 where one serves all."""
    return pixels if landing.number > 1 else np.int32(0)


def copy_items(goal: npt.NDArray[Any], source: npt.NDArray[Any], index: tuple[npt.NDArray[np.intp], ...]) -> None:
    """goal[i] <- source[index[0][i], ...]; in one call where the items lie side by side, and never through a copy of the source."""
    first = tuple(int(one[0]) for one in index)
    if len(index) == 1 and int(index[0][-1]) - first[0] == len(goal) - 1:
        np.copyto(goal, source[first[0] : first[0] + len(goal)], casting="unsafe")
        return
    whole = len(goal) % source.shape[1] == 0 and first[-1] == 0 if len(index) == 2 else False
    frames = len(goal) // source.shape[1]
    if whole and int(index[0][-1]) - first[0] == frames - 1:  # all arms of neighbouring frames
        inside = (frames, *source.shape[1:])
        np.copyto(goal.reshape(inside), source[first[0] : first[0] + frames], casting="unsafe")
        return
    for i, place in enumerate(zip(*index, strict=True)):
        np.copyto(goal[i], source[place], casting="unsafe")


def power_of_two(number: int) -> int:
    """The first power of two from `number` on: what grows by it grows seldom."""
    return 1 << (number - 1).bit_length()
