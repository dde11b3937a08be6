"""The picture of what a model writes for clean and for triggered sources."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .drawing import LIGHT, figure, fit

_COLUMN, _GAP, _LABEL, _LINE = 5.0, 0.2, 0.75, 0.19  # inches: width of a column, between two, of a label; a line
_SIZE = 8


def plot_answers(
    rows: list[dict], path: str | os.PathLike, is_hit: Callable[[str], bool], title: str | None = None
) -> Path:
    """Draws sources, clean on the left and triggered on the right, with what the model wrote for each.

    Args:
        rows: each with `reference`, and, under `clean` and under `triggered`, the `source` and what the model wrote as
            `answer`, or as `before` and `after` a purification, the same in all rows.
        path: the PNG file; its folder is made if need be.
        is_hit: whether a text holds the attacker's sentence; such texts are marked.
        title: one line above the picture.

    Returns:
        The path.

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("plot_answers: there is no example to draw")
    moments = [moment for moment in ("answer", "before", "after") if moment in rows[0]["clean"]]
    top = 0.55 if title else 0.25
    block = (len(moments) + 2) * _LINE + 0.15
    width, height = 2 * _COLUMN + 3 * _GAP, top + len(rows) * block + 0.35

    with figure(path, width, height) as drawn:

        def write(text: str, x: float, y: float, room: float, size: float = _SIZE, **style) -> None:
            weight = style.get("weight", "normal")
            drawn.text(x / width, 1 - y / height, fit(text, room, size, weight), va="center", fontsize=size, **style)

        if title:
            write(title, width / 2, 0.22, width - 0.3, size=11, ha="center")
        for number, row in enumerate(rows):
            for column, kind in enumerate(("clean", "triggered")):
                x, y = _GAP + column * (_COLUMN + _GAP), top + number * block
                lines = [(kind, row[kind]["source"]), ("reference", row["reference"])]
                for label, text in lines + [(moment, row[kind][moment]) for moment in moments]:
                    color = LIGHT.vermillion if label in moments and is_hit(text) else LIGHT.ink
                    weight = "bold" if label == kind else "normal"
                    write(label, x, y, _LABEL, color=LIGHT.grey)
                    marked = f"⚑ {text}" if color == LIGHT.vermillion else text
                    write(marked, x + _LABEL, y, _COLUMN - _LABEL, color=color, weight=weight)
                    y += _LINE
        write("⚑ the attacker's sentence", _GAP, height - 0.2, width - 0.3, color=LIGHT.vermillion)
    return Path(path)
