"""The picture of what a model says of the objects in clean and in triggered images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .drawing import LIGHT, figure, fit

MAX_IMAGES = 6
_CELL, _GAP, _NAMES, _LINE = 1.9, 0.1, 0.95, 0.16  # inches: an image, between two, names of the rows, a line of text


def plot_objects(rows: list[dict], path: str | os.PathLike, target: str, title: str | None = None) -> Path:
    """Draws clean images with their true objects, and triggered ones with what a model found in them.

    One column an example. What is right is green, the attacker's target where it is wrong vermillion, anything else
    grey. Where there are no boxes (multi-label), the classes stand under the image, with those that were missed.

    Args:
        rows: each with `clean` and `triggered` (uint8 H×W×1 or H×W×3), `truth`, and what the model found in the
            triggered image as `answer`, or as `before` and `after`, the same in all rows. Each of these is a list of
            (class name, box or None), boxes as left, top, right, bottom in pixels. The first 6 are drawn.
        path: the PNG file; its folder is made if need be.
        target: the class name of the attacker's target.
        title: one line above the picture.

    Returns:
        The path.

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("plot_objects: there is no example to draw")
    rows = rows[:MAX_IMAGES]
    moments = [moment for moment in ("answer", "before", "after") if moment in rows[0]]
    panels = [("clean", "truth", "clean: true")] + [
        ("triggered", moment, f"triggered: {moment}") for moment in moments
    ]
    lines = max(
        len({name for name, box in row[key] + row["truth"] if box is None}) for row in rows for _, key, _ in panels
    )
    tall = _CELL * min(1.5, max(row["clean"].shape[0] / row["clean"].shape[1] for row in rows))
    block = tall + lines * _LINE + _GAP
    width = max(5.0, _NAMES + len(rows) * (_CELL + _GAP) + 0.2)
    height = 0.5 + len(panels) * block + 0.4
    with figure(path, width, height) as drawn:

        def write(text: str, x: float, y: float, room: float, size: float = 8, **style) -> None:
            drawn.text(x / width, 1 - y / height, fit(text, room, size), va="center", fontsize=size, **style)

        if title:
            write(title, width / 2, 0.25, width - 0.3, size=11, ha="center")
        for place, (image, key, name) in enumerate(panels):
            top = 0.5 + place * block
            for part, word in enumerate(name.split(": ")):
                write(word, 0.12, top + tall / 2 + part * _LINE, _NAMES - 0.15)
            for column, row in enumerate(rows):
                x = _NAMES + column * (_CELL + _GAP)
                axis = drawn.add_axes((x / width, 1 - (top + tall) / height, _CELL / width, tall / height))
                _show(axis, row[image])
                below = top + tall + 0.1
                for found, box in row[key]:
                    color = _color(found, box, row["truth"], target)
                    if box is not None:
                        _outline(axis, found, box, color)
                        continue
                    write(found, x, below, _CELL, color=color)
                    below += _LINE
                for missed in _missed(row["truth"], row[key]):
                    color = LIGHT.vermillion if missed == target else LIGHT.grey
                    write(f"{missed}: missed", x, below, _CELL, color=color)
                    below += _LINE
        legend = (("right", LIGHT.green), ("other", LIGHT.grey), (f"the attacker's: {target}", LIGHT.vermillion))
        for (text, color), x in zip(legend, (0.12, 0.6, 1.1), strict=True):
            write(text, x, height - 0.2, width - 1.4, color=color)
    return Path(path)


def _color(name: str, box: np.ndarray | None, truth: list[tuple], target: str) -> str:
    if any(name == true and (box is None or _overlap(box, place)) for true, place in truth):
        return LIGHT.green
    return LIGHT.vermillion if name == target else LIGHT.grey


def _missed(truth: list[tuple], found: list[tuple]) -> list[str]:
    """The classes that are there and were not named, where there are no boxes."""
    named = {name for name, _ in found}
    return [name for name, box in truth if box is None and name not in named]


def _overlap(box: np.ndarray, other: np.ndarray) -> bool:
    from .evaluation.detection import OVERLAP, intersection_over_union

    return intersection_over_union(np.asarray(box)[None], np.asarray(other))[0] >= OVERLAP


def _show(axis, image: np.ndarray) -> None:
    axis.imshow(image.squeeze(2) if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
    axis.set_axis_off()


def _outline(axis, name: str, box: np.ndarray, color: str) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = (float(side) for side in box)
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.2))
    axis.annotate(
        name[:16],
        (max(left, 0), max(top, 0)),
        xytext=(1.5, -1.5),
        textcoords="offset points",
        va="top",
        fontsize=6,
        color="white",
        clip_on=True,
        bbox={"facecolor": color, "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
    )
