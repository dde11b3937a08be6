"""Pictures of the curvature: spectral densities, its course over a training, and landscapes of the loss.

Each is made for a light or a dark background: `theme=LIGHT` or `DARK` of `hf_fip.drawing`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..drawing import LIGHT, Theme, curve, figure, fit, log_axis
from .lanczos import SpectralDensity
from .landscape import Landscape

POINTS = 2000  # of a density curve
WIDTH = 0.005  # of the Gaussian that smooths a density, as a share of the axis
LEVELS = 14  # of a plane's contours


def plot_spectral_density(
    densities: Mapping[str, SpectralDensity],
    path: str | os.PathLike,
    title: str | None = None,
    theme: Theme = LIGHT,
) -> Path:
    """Draws the density of the Hessian's eigenvalues of one to three models on one axis; the density is logarithmic.

    All are smoothed by the same Gaussian, 0.5 % of the axis wide. The axis of the density starts below the height of a
    single eigenvalue.

    Args:
        densities: for each model's name its density; `received` and `purified`, say.
        path: the PNG file; its folder is made if need be.
        title: one line above the picture.

    Returns:
        The path.

    Raises:
        ValueError: for no density, or more than three.
    """
    if not 1 <= len(densities) <= 3:
        raise ValueError(f"plot_spectral_density draws one to three densities, not {len(densities)}.")
    nodes = np.concatenate([part for density in densities.values() for part in density.nodes])
    low, high = float(nodes.min()), float(nodes.max())
    margin = 0.05 * (high - low) or 1.0
    points = np.linspace(low - margin, high + margin, POINTS)
    width = WIDTH * (points[-1] - points[0])
    single = 1 / (max(density.size for density in densities.values()) * width * math.sqrt(2 * math.pi))
    from matplotlib.ticker import FuncFormatter

    with figure(path, 6.4, 3.6, layout="constrained", theme=theme) as drawn:
        if title:
            drawn.suptitle(fit(title, 6.1, fontsize=11), fontsize=11)
        axis = drawn.subplots()
        styles = ((theme.vermillion, "-"), (theme.blue, "--"), (theme.green, ":"))
        highest = 0.0
        for (name, density), (color, line) in zip(densities.items(), styles, strict=False):
            values = density.at(points, width)
            highest = max(highest, values.max())
            label = f"{fit(name, 1.2, fontsize=9)}: {min(map(min, density.nodes)):.3g} … {_largest(density):.3g}"
            axis.plot(points, values, color=color, linestyle=line, linewidth=1.3, label=label)
        axis.set_yscale("log")
        axis.set_ylim(single / 5, 3 * highest)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
        axis.set(xlabel="eigenvalue of the loss Hessian", ylabel="density (log scale)")
        _finish(axis)
        axis.legend(loc="upper right", frameon=False)
    return Path(path)


def _largest(density: SpectralDensity) -> float:
    return max(map(max, density.nodes))


def plot_curvature(
    history: list[dict], path: str | os.PathLike, title: str | None = None, theme: Theme = LIGHT
) -> Path:
    """Draws λ_max and Tr H over the steps of a training, on a logarithmic axis, with ACC and ASR above.

    Args:
        history: a trainer's `log_history`, or rows like it, each with `step` and any of `curvature_lambda_max`,
            `curvature_trace`, `curve_accuracy` and `curve_asr` (percent). What is absent, not finite or, of the
            curvature, not positive is left out; without ACC and ASR there is one panel.
        path: the PNG file; its folder is made if need be.
        title: one line above the picture.

    Returns:
        The path.

    Raises:
        ValueError: when no row has a positive λ_max or Tr H.
    """
    largest, trace, accuracy, asr = (
        sorted((row["step"], row[key]) for row in history if row.get(key) is not None and math.isfinite(row[key]))
        for key in ("curvature_lambda_max", "curvature_trace", "curve_accuracy", "curve_asr")
    )
    largest, trace = ([(step, value) for step, value in series if value > 0] for series in (largest, trace))
    if not largest + trace:
        raise ValueError("plot_curvature: no row has a positive curvature_lambda_max or curvature_trace")
    panels = 1 + bool(accuracy or asr)
    with figure(path, 6.4, 1.2 + 2.2 * panels, layout="constrained", theme=theme) as drawn:
        if title:
            drawn.suptitle(fit(title, 6.1, fontsize=11), fontsize=11)
        axes = drawn.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        if panels == 2:
            curve(axes[0], accuracy, label="accuracy (ACC)", color=theme.blue, linestyle="-", marker="o")
            curve(axes[0], asr, label="attack success (ASR)", color=theme.vermillion, linestyle="--", marker="s")
            axes[0].set(ylabel="percent", ylim=(-3, 103), yticks=range(0, 101, 20))
        curve(axes[-1], largest, label="λ_max", color=theme.vermillion, linestyle="-", marker="^")
        curve(axes[-1], trace, label="Tr H", color=theme.green, linestyle="--", marker="v")
        log_axis(axes[-1], [value for _, value in largest + trace])
        axes[-1].set(ylabel="curvature (log scale)", xlabel="step (ring: before training)")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        for axis in axes:
            _finish(axis)
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)
        drawn.align_ylabels()
    return Path(path)


def plot_landscape(
    landscapes: Mapping[str, Landscape], path: str | os.PathLike, title: str | None = None, theme: Theme = LIGHT
) -> Path:
    """Draws the loss around one model or several, on one scale: lines (1-D), or contours of the plane (2-D).

    1-D: one panel a model, one line a kind of inputs. 2-D: one row a model, one column a kind; the cross is the model.

    Args:
        landscapes: for each model's name its landscape; all of the same dimensions, kinds and steps.
        path: the PNG file; its folder is made if need be.
        title: one line above the picture.

    Returns:
        The path.

    Raises:
        ValueError: for no landscape, or several of different dimensions or kinds.
    """
    forms = {(tuple(one.losses), next(iter(one.losses.values())).shape) for one in landscapes.values()}
    if len(forms) != 1:
        raise ValueError("plot_landscape draws landscapes of the same kinds of inputs and steps, and at least one.")
    kinds, shape = forms.pop()
    rows, columns = (1, len(landscapes)) if len(shape) == 1 else (len(landscapes), len(kinds))
    width, height = 0.9 + 2.8 * columns, 0.9 + 2.5 * rows
    every = np.concatenate([loss.ravel() for one in landscapes.values() for loss in one.losses.values()])
    positive = every[np.isfinite(every) & (every > 0)]
    if not len(positive):
        raise ValueError("plot_landscape: no loss is positive and finite.")
    low, high = float(positive.min()), float(positive.max())
    with figure(path, width, height, layout="constrained", theme=theme) as drawn:
        if title:
            drawn.suptitle(fit(title, width - 0.3, fontsize=11), fontsize=11)
        axes = drawn.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        if len(shape) == 1:
            styles = ((theme.blue, "-", "o"), (theme.vermillion, "--", "s"), (theme.green, ":", "^"))
            for axis, (name, one) in zip(axes[0], landscapes.items(), strict=True):
                for (kind, loss), (color, line, marker) in zip(one.losses.items(), styles, strict=False):
                    axis.plot(
                        one.steps, loss, line, color=color, marker=marker, markersize=3, linewidth=1.2, label=kind
                    )
                axis.set_title(fit(name, 2.6, fontsize=9), fontsize=9)
                axis.set_xlabel("step / length of the weights")
                _finish(axis)
            log_axis(axes[0, 0], [low, high])
            axes[0, 0].set_ylabel("loss (log scale)")
            axes[0, 0].legend(frameon=False)
        else:
            levels = np.geomspace(low, high * 1.001, LEVELS)
            for line, (name, one) in zip(axes, landscapes.items(), strict=True):
                for axis, (kind, loss) in zip(line, one.losses.items(), strict=True):
                    shown = _contours(axis, one.steps, np.clip(loss, low, high), levels, theme)
                    axis.set_title(fit(f"{name}, {kind}", 2.6, fontsize=9), fontsize=9)
            bar = drawn.colorbar(shown, ax=axes, label="loss (log scale)", format="%.2g")
            bar.outline.set_visible(False)
            drawn.supxlabel("step / length of the weights", fontsize=9)
    return Path(path)


def plot_sharpness(rows: list[dict], path: str | os.PathLike, title: str | None = None, theme: Theme = LIGHT) -> Path:
    """Draws the attack success rate of models against their sharpness: one point a model, λ_max left and Tr H right.

    Args:
        rows: each with `lambda_max` and `trace` (of the loss Hessian; one that is not positive is left out), `asr`
            (percent) and `method`, by which points are coloured and marked: `received` and up to four others.
        path: the PNG file; its folder is made if need be.
        title: one line above the picture.

    Returns:
        The path.

    Raises:
        ValueError: when there is no row.
    """
    if not rows:
        raise ValueError("plot_sharpness: there is no model to draw")
    from matplotlib.ticker import FuncFormatter, NullFormatter

    styles = ((theme.vermillion, "s"), (theme.blue, "o"), (theme.green, "^"), (theme.grey, "D"), (theme.ink, "v"))
    with figure(path, 7.6, 3.6, layout="constrained", theme=theme) as drawn:
        if title:
            drawn.suptitle(fit(title, 7.3, fontsize=11), fontsize=11)
        axes = drawn.subplots(1, 2, sharey=True)
        for axis, key, label in zip(axes, ("lambda_max", "trace"), ("λ_max", "Tr H"), strict=True):
            for method, (color, marker) in zip(dict.fromkeys(r["method"] for r in rows), styles, strict=False):
                own = [row for row in rows if row["method"] == method and row[key] > 0]
                places, rates = [row[key] for row in own], [row["asr"] for row in own]
                axis.plot(places, rates, marker, color=color, markersize=6, label=method)
            axis.set(xscale="log", xlabel=f"{label} (log scale)", ylim=(-4, 104))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            _finish(axis)
        axes[0].set_ylabel("attack success (ASR), percent")
        drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return Path(path)


def _contours(axis, steps: np.ndarray, loss: np.ndarray, levels: np.ndarray, theme: Theme):
    """Filled contours of a plane, and a cross where the model is."""
    from matplotlib.colors import LogNorm

    norm = LogNorm(levels[0], levels[-1])
    shown = axis.contourf(steps, steps, loss.T, levels=levels, norm=norm, cmap="viridis")
    axis.contour(steps, steps, loss.T, levels=levels, colors=theme.background, linewidths=0.3)
    axis.plot(0, 0, "+", color="#FFFFFF", markersize=10, markeredgewidth=1.8)
    axis.set_aspect("equal")
    return shown


def _finish(axis) -> None:
    axis.grid(True)
    axis.set_axisbelow(True)
