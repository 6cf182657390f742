"""The look of every picture: colours, sizes, images with their scales, and a figure as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from streamprior.records import NOT_MEASURED

# Okabe and Ito 2008: told apart by every kind of colour vision. Class colours are the live page's (streamprior/page.html), core first.
CLASS_COLOURS = ("#f0e442", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
UNMEASURED = "#3c3c3c"
MEASURED_LINE, MODEL_LINE = "#000000", "#d55e00"

# (colour, dashes, width): an arm looks the same in every picture, and no two rely on colour alone.
ARM_STYLES = {
    "random": ("#8c8c8c", "-", 1.2),
    "flat": ("#56b4e9", "-", 1.2),
    "flat + plan": ("#0072b2", "-", 1.6),
    "zero phase": ("#cc79a7", "--", 1.2),
    "prototype": ("#e69f00", "-", 1.4),
    "best of k": ("#e69f00", "--", 1.6),
    "shuffled prototype": ("#8a6d1d", ":", 1.6),
    "nearest solved frame": ("#009e73", "-.", 1.4),
    "full solve": ("#000000", "--", 1.4),
    "oracle": ("#000000", ":", 1.4),
    "streamprior": ("#d55e00", "-", 2.6),
}
OTHER_ARM = ("#6a3d9a", "-.", 1.2)

_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.dpi": 130,
    "image.interpolation": "nearest",
    "legend.frameon": False,
}


def drawn(draw: Callable[..., Figure], *args: Any) -> bytes:
    """The figure that `draw(*args)` returns, as PNG, in our style; nothing of matplotlib's global state is touched."""
    with mpl.rc_context(_STYLE):
        stream = io.BytesIO()
        draw(*args).savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure of `size` inches and its axes (rows, columns), without pyplot, which would look for a display."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def image(axis: Any, values: npt.NDArray[Any], title: str, colours: str, label: str = "", **more: Any) -> None:
    """One picture with its colour bar; NaN is grey, which neither viridis, cividis nor twilight holds."""
    chart = mpl.colormaps[colours].with_extremes(bad="0.55")
    shown = axis.imshow(values, cmap=chart, **more)
    _bare(axis, title)
    axis.figure.colorbar(shown, ax=axis, shrink=0.8, label=label)


def class_map(axis: Any, ids: npt.NDArray[np.uint8], number: int, title: str) -> None:
    """Class ids in the classes' colours; dark grey was not measured."""
    shades = [class_colour(k) for k in range(number)]
    axis.imshow(np.where(ids == NOT_MEASURED, number, ids), cmap=ListedColormap([*shades, UNMEASURED]), vmin=-0.5, vmax=number + 0.5)
    _bare(axis, title)


def log_scale(axis: Any, which: str) -> None:
    """A logarithmic axis ("x" or "y") that is labelled 1, 2, 5 in plain numbers; a range too narrow for two labels stays linear."""
    ruler = axis.xaxis if which == "x" else axis.yaxis
    low, high = ruler.get_data_interval()
    if not high > 4 * low > 0:
        return
    axis.set(**{f"{which}scale": "log"})
    ruler.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    ruler.set_major_formatter("{x:g}")
    ruler.set_minor_formatter(NullFormatter())


def class_colour(k: int) -> str:
    """The colour of class k in every picture; with more than seven classes colours come back."""
    return CLASS_COLOURS[k % len(CLASS_COLOURS)]


def _bare(axis: Any, title: str) -> None:
    """A picture has no axes to read: neither ticks nor a frame."""
    axis.set_title(title)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def plane(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What can be shown of a field: itself, or the slice through the centre of a volume."""
    return array if array.ndim == 2 else array[array.shape[0] // 2]
