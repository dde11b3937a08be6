"""The picture of an attack on clips: their frames, clean and triggered."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np

from .drawing import LIGHT, figure
from .plots import _gain, _show, _verdict, _write

MAX_CLIPS = 4
MAX_FRAMES = 8


def plot_clip_triggers(rows: list[dict], path: str | os.PathLike, target: str, title: str | None = None) -> Path:
    """Draws what the trigger changes in a clip, and what it does to a model, or did before and after purification.

    Three strips of frames an example, one above the other: clean, triggered, and their absolute difference, amplified
    by one factor for all (the largest of 1, 2, 5, 10, … that clips nothing). Beside the strips stand the model's
    answers, marked as right, as the attacker's target, or as another class.

    Args:
        rows: each with `clean` and `triggered` (uint8 arrays of one shape, (T, H, W, 1 or 3)), `label` (the true class
            name), and the model's answers, `{"clean": class name, "triggered": class name}`, as `answer` or as
            `before` and `after`, the same in all rows. The first 4 are drawn, and of each at most 8 frames, evenly
            spaced.
        path: the PNG file; its folder is made if need be.
        target: the class name that the attacker wants.
        title: one line above the picture.

    Returns:
        The path.

    Raises:
        ValueError: if there is no row, or a pair of clips is not uint8 of one such shape.
    """
    if not rows:
        raise ValueError("plot_clip_triggers: there is no example to draw")
    rows = rows[:MAX_CLIPS]
    for row in rows:
        clean, triggered = row["clean"], row["triggered"]
        if clean.dtype != np.uint8 or clean.ndim != 4 or clean.shape != triggered.shape:
            raise ValueError(
                "plot_clip_triggers: clean and triggered are uint8 (T, H, W, C) of one shape; got "
                f"{clean.dtype} {clean.shape} and {triggered.dtype} {triggered.shape}"
            )
    moments = [moment for moment in ("answer", "before", "after") if moment in rows[0]]
    differences = [np.abs(row["triggered"].astype(int) - row["clean"]) for row in rows]
    gain = _gain(max(int(difference.max()) for difference in differences))

    # All in inches, from the top left: the picture is as large as its content, and nothing can overlap.
    cell, gap, names, answers, line = 0.75, 0.04, 0.75, 2.0, 0.17
    frames = min(MAX_FRAMES, max(len(row["clean"]) for row in rows))
    tall = cell * min(1.5, max(row["clean"].shape[1] / row["clean"].shape[2] for row in rows))
    block = 3 * (tall + gap) + 0.32
    width = 0.3 + names + frames * (cell + gap) + answers
    top = 0.5 if title else 0.2
    height = top + len(rows) * block + 0.3

    with figure(path, width, height) as drawn:
        write = partial(_write, drawn, width, height)
        if title:
            write(title, width / 2, 0.22, width - 0.3, fontsize=11, ha="center")
        for number, (row, difference) in enumerate(zip(rows, differences, strict=True)):
            y = top + number * block
            write(f"true: {row['label']}", 0.15 + names, y + 0.1, width - names - 0.3, weight="bold")
            strips = {"clean": row["clean"], "triggered": row["triggered"], f"diff. ×{gain}": difference * gain}
            chosen = np.linspace(0, len(difference) - 1, min(frames, len(difference))).round().astype(int)
            for place, (name, strip) in enumerate(strips.items()):
                upper = y + 0.22 + place * (tall + gap)
                write(name, 0.15, upper + tall / 2, names, fontsize=9)
                for column, frame in enumerate(strip[chosen].astype(np.uint8)):
                    left = 0.15 + names + column * (cell + gap)
                    axis = drawn.add_axes((left / width, 1 - (upper + tall) / height, cell / width, tall / height))
                    _show(axis, frame.squeeze(2) if frame.shape[2] == 1 else frame)
                for below, moment in enumerate(moments if name in ("clean", "triggered") else ()):
                    symbol, color = _verdict(row[moment][name], row["label"], target)
                    middle = upper + tall / 2 + (below - (len(moments) - 1) / 2) * line
                    left = 0.25 + names + frames * (cell + gap)
                    write(f"{symbol} {moment}: {row[moment][name]}", left, middle, answers - 0.2, color=color)
        legend = (("✓ true class", LIGHT.green), ("✗ another class", LIGHT.grey))
        legend += ((f"⚑ attacker's target: {target}", LIGHT.vermillion),)
        for (text, color), x, room in zip(legend, (0, 0.95, 2.1), (0.9, 1.1, width - 2.4), strict=True):
            write(text, 0.15 + x, height - 0.15, room, color=color)
    return Path(path)
