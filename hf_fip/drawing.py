"""What all pictures share: colours, style, and writing a figure so that it appears only when it is complete.

matplotlib is imported when something is drawn, never through pyplot, and with its default style whatever the caller
has set: the same data give the same picture in a script, a notebook and a Trainer callback.
"""

from __future__ import annotations

import math
import os
from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours that are told apart with every common colour vision, on one background."""

    background: str
    ink: str
    grid: str
    blue: str
    vermillion: str
    green: str
    grey: str


# Okabe and Ito, "Color Universal Design" (2008); the green is darkened, for small text on white.
LIGHT = Theme("#FFFFFF", "#000000", "#DDDDDD", "#0072B2", "#D55E00", "#007A59", "#595959")
DARK = Theme("#0D1117", "#E6EDF3", "#30363D", "#56B4E9", "#E69F00", "#2FC9A0", "#9DA7B3")

DPI = 150


def _style(theme: Theme) -> dict:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        "text.parse_math": False,  # class names and titles come from strangers: a $ or _ is a character
        "font.size": 9.0,
        "figure.constrained_layout.h_pad": 0.1,
        "figure.constrained_layout.w_pad": 0.1,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": theme.background,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        **dict.fromkeys(inked, theme.ink),
    }


@contextmanager
def figure(
    path: str | os.PathLike, width: float, height: float, layout: str | None = None, theme: Theme = LIGHT
) -> Iterator[Figure]:
    """A figure of this many inches, written to `path` as PNG on leaving: first beside it, then renamed."""
    from matplotlib import style
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with style.context(["default", _style(theme)]):
        drawn = Figure(figsize=(width, height), facecolor=theme.background, layout=layout)
        yield drawn
        try:
            drawn.savefig(partial, format="png", dpi=DPI)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def fit(text: str, room: float, fontsize: float, weight: str = "normal") -> str:
    """The text on one line, cut with … to `room` inches in this font."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=fontsize, weight=weight)

    def too_wide(text: str) -> bool:
        return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] > room * 72

    text = " ".join(text[:1000].split())
    if not too_wide(text):
        return text
    cut = bisect(range(1, len(text)), False, key=lambda length: too_wide(text[:length] + "…"))
    return text[:cut] + "…"


def curve(axis: Axes, series: list[tuple[int, float]], **style) -> None:
    """One curve with about twenty markers, and a ring around what was measured at step 0."""
    if not series:
        return
    steps, values = zip(*series, strict=True)
    every = math.ceil(len(steps) / 20)
    axis.plot(steps, values, linewidth=1.2, markersize=4, markevery=every, **style)
    if steps[0] == 0:
        axis.plot(0, values[0], marker="o", color=style["color"], markerfacecolor="none", markersize=10)


def log_axis(axis: Axes, values: list[float]) -> None:
    """A logarithmic axis of at least one decade, its ticks in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.06 * (high - low), (1 - high + low) / 2)
    axis.set_yscale("log")
    axis.set_ylim(10 ** (low - margin), 10 ** (high + margin))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low < 2.5 else (1,)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
