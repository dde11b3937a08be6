"""The picture of an attack on point clouds, in three dimensions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .drawing import LIGHT, figure, fit
from .plots import _verdict

MAX_CLOUDS = 6
_CELL = 1.9  # inches, of a column


def plot_cloud_triggers(rows: list[dict], path: str | os.PathLike, target: str, title: str | None = None) -> Path:
    """Draws what the trigger changes in a cloud, and what it does to a model, or did before and after purification.

    One column an example: the clean cloud, and the triggered one with the points that are not in the clean one in
    another colour and larger. Under the clouds stand the model's answers, marked as right, as the attacker's target,
    or as another class.

    Args:
        rows: each with `clean` and `triggered` (float arrays (N, 3)), `label` (the true class name), and the model's
            answers, `{"clean": class name, "triggered": class name}`, as `answer` or as `before` and `after`, the same
            in all rows. The first 6 are drawn.
        path: the PNG file; its folder is made if need be.
        target: the class name that the attacker wants.
        title: one line above the picture.

    Returns:
        The path.

    Raises:
        ValueError: if there is no row, or a cloud is not (N, 3).
    """
    if not rows:
        raise ValueError("plot_cloud_triggers: there is no example to draw")
    rows = rows[:MAX_CLOUDS]
    for row in rows:
        for kind in ("clean", "triggered"):
            if np.ndim(row[kind]) != 2 or np.shape(row[kind])[1] != 3:
                raise ValueError(f"plot_cloud_triggers: {kind} is a cloud (N, 3); got the shape {np.shape(row[kind])}")
    moments = [moment for moment in ("answer", "before", "after") if moment in rows[0]]
    reach = max(np.abs(row["triggered"]).max() for row in rows)
    width, height = max(5.2, 0.2 + _CELL * len(rows)), 1.2 + 2 * (_CELL + 0.16 * len(moments))
    with figure(path, width, height) as drawn:
        if title:
            drawn.text(0.5, 1 - 0.25 / height, fit(title, width - 0.3, 11), fontsize=11, ha="center", va="center")
        left = (width - _CELL * len(rows)) / 2
        for column, row in enumerate(rows):
            x = left + column * _CELL
            drawn.text(
                (x + _CELL / 2) / width,
                1 - 0.55 / height,
                fit(f"true: {row['label']}", _CELL - 0.2, 9, "bold"),
                fontsize=9,
                weight="bold",
                ha="center",
                va="center",
            )
            for place, kind in enumerate(("clean", "triggered")):
                top = 0.65 + place * (_CELL + 0.16 * len(moments) + 0.05)
                axis = drawn.add_axes(
                    (x / width, 1 - (top + _CELL) / height, _CELL / width, _CELL / height), projection="3d"
                )
                _scatter(axis, row[kind], row["clean"], reach)
                for line, moment in enumerate(moments):
                    symbol, color = _verdict(row[moment][kind], row["label"], target)
                    drawn.text(
                        (x + _CELL / 2) / width,
                        1 - (top + _CELL + 0.04 + 0.16 * line) / height,
                        fit(f"{symbol} {moment}: {row[moment][kind]}", _CELL - 0.1, 8),
                        fontsize=8,
                        color=color,
                        ha="center",
                        va="center",
                    )
        legend = f"⚑ attacker's target: {target}    ● points of the trigger"
        legend = fit(legend, width - 0.3, 8)
        drawn.text(0.15 / width, 0.2 / height, legend, fontsize=8, color=LIGHT.vermillion, va="center")
    return Path(path)


def _scatter(axis, cloud: np.ndarray, clean: np.ndarray, reach: float) -> None:
    """A cloud; the points that the clean one lacks stand out, unless they are all of them."""
    known = {point.tobytes() for point in np.ascontiguousarray(clean)}
    new = np.array([point.tobytes() not in known for point in np.ascontiguousarray(cloud)])
    if new.all():
        new[:] = False
    axis.scatter(*cloud[~new].T, s=1.5, color=LIGHT.blue, linewidths=0, depthshade=True)
    axis.scatter(*cloud[new].T, s=9, color=LIGHT.vermillion, linewidths=0, depthshade=False, clip_on=False)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))
    axis.set_box_aspect((1, 1, 1))
    axis.set_axis_off()
    axis.view_init(elev=20, azim=-60)
