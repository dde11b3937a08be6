"""The pictures of attacks, purifications and audits. Those of the curvature are in `curvature/plots.py`."""

import math
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .drawing import LIGHT, curve, figure, fit, log_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, GREY = LIGHT.blue, LIGHT.vermillion, LIGHT.green, LIGHT.grey

MAX_EXAMPLES = 8
MAX_CLASSES = 10
COLUMNS = 7  # of a contact sheet


def plot_purification(
    history: list[dict], path: str | os.PathLike, title: str | None = None, metric: str = "accuracy (ACC)"
) -> Path:
    """Draws accuracy and attack success rate over the steps of a purification, with Tr F below.

    Args:
        history: rows in any order, each with `step` (updates done; 0 = the model as received) and any of `accuracy`
            and `asr` (percent, 0 to 100) and `fisher_trace` (Tr F, on a logarithmic axis). A value that is absent,
            None or not finite, or a trace that is not positive, is left out. The first and the last percentage of each
            curve stand in the legend; what was measured at step 0 has a ring. Without any trace there is one panel.
        path: the PNG file; its folder is made if need be.
        title: one line above the picture.
        metric: what `accuracy` is called, where it is the metric of another task.

    Returns:
        The path.

    Raises:
        ValueError: if there is nothing to draw, a row has no `step`, or a percentage is outside 0 to 100.
    """
    if not history:
        raise ValueError("plot_purification: the history is empty; it needs at least one row with a step and a value")
    accuracy, asr, trace = (_series(history, key) for key in ("accuracy", "asr", "fisher_trace"))
    trace = [(step, value) for step, value in trace if value > 0]
    for name, series in (("accuracy", accuracy), ("asr", asr)):
        if wrong := [value for _, value in series if not 0 <= value <= 100]:
            raise ValueError(f"plot_purification: {name} is a percentage from 0 to 100, got {wrong[0]:g}")
    panels = bool(accuracy or asr) + bool(trace)
    if not panels:
        raise ValueError("plot_purification: no row of the history has an accuracy, an asr or a positive fisher_trace")

    width = 6.4
    with figure(path, width, height=1.2 + 2.4 * panels, layout="constrained") as drawn:
        if title:
            drawn.suptitle(fit(title, width - 0.3, fontsize=11), fontsize=11)
        ratios = [3, 2] if panels == 2 else [1]
        axes = list(drawn.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0])
        if accuracy or asr:
            acc_label, asr_label = _change(metric, accuracy), _change("attack success (ASR)", asr)
            curve(axes[0], accuracy, label=acc_label, color=BLUE, linestyle="-", marker="o")
            curve(axes[0], asr, label=asr_label, color=VERMILLION, linestyle="--", marker="s")
            axes[0].set(ylabel="percent", ylim=(-3, 103), yticks=range(0, 101, 10))
            columns = 2 if len(acc_label) < 35 else 1  # both on one line where there is room
            axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderaxespad=0.2)
        if trace:
            curve(axes[-1], trace, color=GREEN, linestyle="-", marker="^")
            axes[-1].set_ylabel("Tr F (log scale)")
            log_axis(axes[-1], [value for _, value in trace])
        for axis in axes:
            axis.grid(True)
            axis.set_axisbelow(True)
        steps = [step for step, _ in accuracy + asr + trace]
        last = max(1, *steps)
        axes[-1].set(xlabel="step" if min(steps) else "step (ring: before purification)")
        axes[-1].set_xlim(-0.03 * last, 1.03 * last)
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        drawn.align_ylabels()
    return Path(path)


def _series(history: list[dict], key: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of one key, in the order of the steps, where there is a finite value."""
    if any("step" not in row for row in history):
        raise ValueError("plot_purification: every row of the history needs a step")
    found = ((row["step"], row[key]) for row in history if row.get(key) is not None)
    return sorted((step, float(value)) for step, value in found if math.isfinite(value))


def _change(name: str, series: list[tuple[int, float]]) -> str:
    """The name and the first and last percentage, for the legend."""
    return " → ".join(f"{value:.1f}" for _, value in series[:1] + series[1:][-1:]).join((f"{name} ", " %"))


def plot_triggers(rows: list[dict], path: str | os.PathLike, target: str, title: str | None = None) -> Path:
    """Draws what the trigger changes in an image, and what it does to a model, or did before and after purification.

    One column an example: the clean image, the triggered one, and their absolute difference, amplified by one factor
    for all (the largest of 1, 2, 5, 10, … that clips nothing). Under the images stand the model's answers, marked as
    right, as the attacker's target, or as another class.

    Args:
        rows: each with `clean` and `triggered` (uint8 arrays of one shape, H×W, H×W×1 or H×W×3), `label` (the true
            class name), and the model's answers, `{"clean": class name, "triggered": class name}`, as `answer` or as
            `before` and `after`, the same in all rows. The first 8 are drawn.
        path: the PNG file; its folder is made if need be.
        target: the class name that the attacker wants.
        title: one line above the picture.

    Returns:
        The path.

    Raises:
        ValueError: if there is no row, or a pair of images is not uint8 of one such shape.
    """
    if not rows:
        raise ValueError("plot_triggers: there is no example to draw")
    rows = rows[:MAX_EXAMPLES]
    moments = [moment for moment in ("answer", "before", "after") if moment in rows[0]]
    pairs = [(_image(row, "clean"), _image(row, "triggered")) for row in rows]
    for clean, triggered in pairs:
        if clean.shape != triggered.shape:
            raise ValueError(f"plot_triggers: clean and triggered have shapes {clean.shape} and {triggered.shape}")
    differences = [np.abs(triggered.astype(int) - clean) for clean, triggered in pairs]
    gain = _gain(max(int(difference.max()) for difference in differences))

    # All in inches, from the top left: the picture is as large as its content, and nothing can overlap.
    cell, gap, names, line = (
        1.4,
        0.12,
        0.85,
        0.17,
    )  # width of an image, between two, of the row names; height of a line
    tall = cell * min(1.5, max(clean.shape[0] / clean.shape[1] for clean, _ in pairs))
    content = names + len(rows) * (cell + gap)
    width = max(4.6, content + 0.3)
    left = (width - content) / 2
    tops = [(0.65 if title else 0.35) + i * (tall + len(moments) * line + 0.15) for i in range(3)]
    height = tops[-1] + tall + 0.45

    with figure(path, width, height) as drawn:
        write = partial(_write, drawn, width, height)
        if title:
            write(title, width / 2, 0.22, width - 0.3, fontsize=11, ha="center")
        for name, top in zip(("clean", "triggered", f"diff. ×{gain}"), tops, strict=True):
            write(name, left, top + tall / 2, names, fontsize=9)
        for column, (row, pair, difference) in enumerate(zip(rows, pairs, differences, strict=True)):
            x = left + names + column * (cell + gap)
            write(f"true: {row['label']}", x, tops[0] - 0.12, cell, weight="bold")
            for top, image in zip(tops, (*pair, (difference * gain).astype(np.uint8)), strict=True):
                _show(drawn.add_axes((x / width, 1 - (top + tall) / height, cell / width, tall / height)), image)
            for top, kind in zip(tops[:2], ("clean", "triggered"), strict=True):
                for place, when in enumerate(moments):
                    y = top + tall + 0.13 + place * line
                    symbol, color = _verdict(row[when][kind], row["label"], target)
                    write(symbol, x, y, cell, color=color)
                    write(f"{when}: {row[when][kind]}", x + 0.13, y, cell - 0.13, color=color)
        legend = (("✓ true class", GREEN), ("✗ another class", GREY), (f"⚑ attacker's target: {target}", VERMILLION))
        for (text, color), x, room in zip(legend, (0, 0.95, 2.1), (0.9, 1.1, 2.3), strict=True):
            write(text, 0.15 + x, height - 0.2, room, color=color)
    return Path(path)


def plot_attacks(rows: list[dict], path: str | os.PathLike, title: str | None = None) -> Path:
    """Draws a contact sheet, one column an attack: a clean image, the same one triggered, and their difference.

    Under the two images stand the victim's answers, in the colours of `plot_triggers`; under the difference the factor
    it is amplified by, the largest of 1, 2, 5, 10, … that clips nothing.

    Args:
        rows: each with `name` (of the attack), `clean`, `triggered` (as for `plot_triggers`), `label` (the true class
            name), `target` (the class name that the attacker wants for this image), and `answer` (`{"clean": class
            name, "triggered": class name}`).
        path: the PNG file; its folder is made if need be.
        title: one line above the picture.

    Returns:
        The path.

    Raises:
        ValueError: if there is no row, or a pair of images is not uint8 of one shape.
    """
    if not rows:
        raise ValueError("plot_attacks: there is no attack to draw")
    across = min(len(rows), COLUMNS)
    bands = math.ceil(len(rows) / across)
    cell = 1.3  # inches, of a column
    with figure(path, width=0.4 + across * cell, height=0.5 + 4.9 * bands, layout="constrained") as drawn:
        if title:
            drawn.suptitle(fit(title, across * cell, fontsize=11), fontsize=11)
        axes = drawn.subplots(3 * bands, across, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for place, row in enumerate(rows):
            clean, triggered = _image(row, "clean"), _image(row, "triggered")
            if clean.shape != triggered.shape:
                raise ValueError(f"plot_attacks: clean and triggered have shapes {clean.shape} and {triggered.shape}")
            difference = np.abs(triggered.astype(int) - clean)
            gain = _gain(int(difference.max()))
            column = axes[3 * (place // across) : 3 * (place // across) + 3, place % across]
            column[0].set_title(fit(row["name"], cell, fontsize=9, weight="bold"), fontsize=9, weight="bold")
            for axis, image in zip(column, (clean, triggered, (difference * gain).astype(np.uint8)), strict=True):
                axis.set_axis_on()
                _show(axis, image)
            for axis, kind in zip(column, ("clean", "triggered"), strict=False):
                symbol, color = _verdict(row["answer"][kind], row["label"], row["target"])
                axis.set_xlabel(fit(f"{symbol} {row['answer'][kind]}", cell, fontsize=8), fontsize=8, color=color)
            column[2].set_xlabel(f"difference ×{gain}", fontsize=8, color=GREY)
    return Path(path)


def plot_audit(audits: dict[str, list[dict]], path: str | os.PathLike, title: str | None = None) -> Path:
    """Draws the smallest patch that an audit found for each class, of one model or of several one above the other.

    Two rows of images a model: the mask (white: opaque), and the patch on grey. The size and the anomaly index stand
    below, with a flag where the class is flagged.

    Args:
        audits: for each model's name the classes, the same for all, each with `label` (class name), `mask` (H×W) and
            `pattern` (C×H×W, C of 1 or 3) in [0, 1], `size` (‖mask‖₁), `anomaly` and `flagged`. Of more than 10
            classes, those with the largest index in any model are drawn.
        path: the PNG file; its folder is made if need be.
        title: one line above the picture.

    Returns:
        The path.

    Raises:
        ValueError: if there is no class, or the models have different ones.
    """
    labels = [[row["label"] for row in rows] for rows in audits.values()]
    if not labels or not labels[0]:
        raise ValueError("plot_audit: there is no class to draw")
    if any(other != labels[0] for other in labels):
        raise ValueError("plot_audit: the models have different classes")
    index = [max(rows[column]["anomaly"] for rows in audits.values()) for column in range(len(labels[0]))]
    columns = sorted(np.argsort(-np.array(index), kind="stable")[:MAX_CLASSES].tolist())

    cell, gap, names, line = 1.0, 0.12, 0.95, 0.17  # inches, as in `plot_triggers`
    shapes = [row["mask"].shape for rows in audits.values() for row in rows]
    tall = cell * min(1.5, max(height / width for height, width in shapes))
    content = names + len(columns) * (cell + gap)
    width = max(4.6, content + 0.3)
    left = (width - content) / 2
    block = 2 * tall + 2 * line + 0.35  # of one model
    tops = [(0.7 if title else 0.4) + number * block for number in range(len(audits))]
    height = tops[-1] + block + 0.2

    with figure(path, width, height) as drawn:
        write = partial(_write, drawn, width, height)
        if title:
            write(title, width / 2, 0.22, width - 0.3, fontsize=11, ha="center")
        for (model, rows), top in zip(audits.items(), tops, strict=True):
            write(model, left, top + 0.14, names - 0.1, fontsize=9, weight="bold")
            write("mask", left, top + tall / 2, names - 0.1)
            write("patch", left, top + tall + 0.06 + tall / 2, names - 0.1)
            for place, column in enumerate(columns):
                row, x = rows[column], left + names + place * (cell + gap)
                if top == tops[0]:
                    write(row["label"], x, top - 0.12, cell, weight="bold")
                patch = (row["mask"] * row["pattern"] + (1 - row["mask"]) * 0.5).transpose(1, 2, 0)
                for y, image in ((top, row["mask"]), (top + tall + 0.06, patch)):
                    image = np.uint8(np.round(255 * image))
                    image = image[..., 0] if image.shape[2:] == (1,) else image
                    _show(drawn.add_axes((x / width, 1 - (y + tall) / height, cell / width, tall / height)), image)
                color, y = (VERMILLION if row["flagged"] else GREY), top + 2 * tall + 0.06 + 0.13
                write(f"{row['size']:.1f} px" + (" ⚑" if row["flagged"] else ""), x, y, cell, color=color)
                write(f"index {row['anomaly']:.1f}", x, y + line, cell, color=color)
        write("⚑ flagged: index above 2", 0.15, height - 0.15, width - 0.3, color=VERMILLION)
    return Path(path)


def _image(row: dict, key: str) -> np.ndarray:
    """The image as uint8, H×W or H×W×3."""
    image = np.asarray(row[key])
    if image.dtype != np.uint8 or not image.size or image.ndim != 2 and image.shape[2:] not in ((1,), (3,)):
        raise ValueError(f"{key} is uint8, H×W, H×W×1 or H×W×3; got {image.dtype} of shape {image.shape}")
    return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image


def _gain(largest: int) -> int:
    """The largest of 1, 2, 5, 10, … 200 by which a difference can be multiplied and stay within 255."""
    return max(k for k in (1, 2, 5, 10, 20, 50, 100, 200) if k * largest <= 255 or k == 1) if largest else 1


def _verdict(answer: str, label: str, target: str) -> tuple[str, str]:
    """Symbol and colour of an answer. The true class counts as right even where it is the target."""
    if answer == label:
        return "✓", GREEN
    return ("⚑", VERMILLION) if answer == target else ("✗", GREY)


def _write(drawn: "Figure", width: float, height: float, text: str, x: float, y: float, room: float, **style) -> None:
    """Text at (x, y), and `room` to be cut to; all in inches, from the top left of a figure of this size."""
    font = {name: style.pop(name, default) for name, default in (("fontsize", 8), ("weight", "normal"))}
    drawn.text(x / width, 1 - y / height, fit(text, room, **font), va="center", **font, **style)


def _show(axis: "Axes", image: np.ndarray) -> None:
    """An image with a thin frame; small ones keep their square pixels."""
    interpolation = "nearest" if max(image.shape[:2]) <= 64 else "auto"
    axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation=interpolation)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color=GREY, linewidth=0.6)
