"""The loss around a model, and the pictures of its curvature."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_fisher_models import linear, make_batch, resnet, vit
from test_plots import BROKEN_MATH, WIDE, has_color, texts  # noqa: F401  (a fixture)
from trainer_cases import identical, weights

from hf_fip.curvature import Hessian, Landscape, SpectralDensity, loss_landscape
from hf_fip.curvature.landscape import filter_normalised
from hf_fip.curvature.plots import plot_curvature, plot_landscape, plot_sharpness, plot_spectral_density
from hf_fip.drawing import DARK, LIGHT

BATCH = make_batch("resnet")
THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])


def test_a_direction_is_as_long_as_the_weights_filter_by_filter():
    shapes = [p for p in resnet().parameters() if p.ndim > 1]
    direction = filter_normalised(shapes, torch.Generator().manual_seed(0))
    for drawn, weight in zip(direction, shapes, strict=True):
        torch.testing.assert_close(drawn.flatten(1).norm(dim=1), weight.detach().flatten(1).norm(dim=1))
    other = filter_normalised(shapes, torch.Generator().manual_seed(1))
    assert not torch.allclose(direction[0], other[0])


def test_the_middle_is_the_model_and_a_step_moves_filters_only():
    model, found = resnet(), {}
    before = weights(model)
    landscape = loss_landscape(model, {"clean": [BATCH], "other": [make_batch("resnet", seed=1)]}, points=3, span=0.5)
    for kind, seed in (("clean", 0), ("other", 1)):
        assert landscape.losses[kind][1] == Hessian(resnet(), [make_batch("resnet", seed=seed)]).value()
    assert identical(weights(model), before) and landscape.steps.tolist() == [-0.5, 0.0, 0.5]
    moved = [p for p in model.parameters() if p.ndim > 1]
    for parameter, step in zip(moved, filter_normalised(moved, torch.Generator().manual_seed(0)), strict=True):
        found[parameter] = parameter.data + 0.5 * step
    for parameter, value in found.items():
        parameter.data = value
    assert landscape.losses["clean"][2] == pytest.approx(Hessian(model, [BATCH]).value(), rel=1e-5)


def test_a_plane_holds_the_line_and_the_first_axis_is_the_first_direction():
    model, batches = vit(), {"clean": [make_batch("vit")]}
    line = loss_landscape(model, batches, points=3, seed=4).losses["clean"]
    plane = loss_landscape(model, batches, points=3, seed=4, dimensions=2).losses["clean"]
    assert plane.shape == (3, 3)
    np.testing.assert_allclose(plane[:, 1], line, rtol=1e-5)
    assert not np.allclose(plane[1], line)


def test_a_scaled_filter_before_batchnorm_does_not_change_the_landscape():
    """The normalisation is by filter: with fresh statistics, a model that is scaled has the same picture."""
    model = resnet()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 0.0
    expected = loss_landscape(model, {"clean": [BATCH]}, points=3).losses["clean"]
    with torch.no_grad():
        convolution, norm = next(
            (module.convolution, module.normalization) for module in model.modules() if hasattr(module, "convolution")
        )
        convolution.weight.mul_(10.0)
        norm.running_mean.mul_(10.0)
        norm.running_var.mul_(100.0)
    scaled = loss_landscape(model, {"clean": [BATCH]}, points=3).losses["clean"]
    np.testing.assert_allclose(scaled, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": 3}, "dimensions=1 or 2"),
        ({"points": 1}, "at least 2 points"),
        ({"model": "norms"}, "no weight"),
    ],
)
def test_a_landscape_that_cannot_be_made_is_refused(options, message):
    model = torch.nn.LayerNorm(5) if options.pop("model", None) else linear()
    with pytest.raises(ValueError, match=message):
        loss_landscape(model, {"clean": [make_batch("linear")]}, **options)


# Pictures


def drawn(path, theme) -> np.ndarray:
    """The picture, after a check that nothing touches its border."""
    with Image.open(path) as picture:
        pixels = np.array(picture.convert("RGB"))
    background = [int(theme.background[i : i + 2], 16) for i in (1, 3, 5)]
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3)])
    assert (np.concatenate([border, pixels[:, -3:].reshape(-1, 3)]) == background).all()
    return pixels


def density(largest: float) -> SpectralDensity:
    nodes = np.array([largest, largest / 2, 0.1, -0.5])
    return SpectralDensity([nodes], [np.array([0.001, 0.01, 0.9, 0.089])], 1000)


def landscape(dimensions: int, scale: float = 1.0) -> Landscape:
    steps = np.linspace(-1, 1, 5)
    bowl = sum(np.meshgrid(*[steps**2] * dimensions, indexing="ij"))
    return Landscape(steps, {"clean": scale * bowl + 0.1, "triggered": 2 * scale * bowl + 0.001})


HISTORY = [{"step": s, "curvature_lambda_max": 90 * 0.9**s, "curvature_trace": 900 * 0.9**s} for s in range(20)]
HISTORY += [{"step": s, "curve_accuracy": 95.0, "curve_asr": 100 - 5.0 * s} for s in range(20)]
ROWS = [{"lambda_max": 10.0 * n, "trace": 50.0 * n - 40, "asr": 9.0 * n, "method": f"m{n % 3}"} for n in range(1, 10)]
PICTURES = {
    "density": lambda path, title, theme: plot_spectral_density(
        {"received": density(100), title: density(5)}, path, title, theme
    ),
    "course": lambda path, title, theme: plot_curvature(HISTORY, path, title, theme),
    "line": lambda path, title, theme: plot_landscape(
        {"received": landscape(1), title: landscape(1)}, path, title, theme
    ),
    "plane": lambda path, title, theme: plot_landscape(
        {"received": landscape(2), title: landscape(2)}, path, title, theme
    ),
    "sharpness": lambda path, title, theme: plot_sharpness(ROWS, path, title, theme),
}


@THEMES
@pytest.mark.parametrize("picture", PICTURES)
def test_pictures_are_whole_and_legible_on_light_and_dark(tmp_path, texts, picture, theme):  # noqa: F811
    pixels = drawn(PICTURES[picture](tmp_path / "p.png", "digits", theme), theme)
    assert picture == "plane" or has_color(pixels, theme.blue) or picture == "course"
    assert picture == "plane" or has_color(pixels, theme.vermillion)
    written = [text for text, _ in texts if text.strip()]
    assert len(written) > 8 and not any("$" in text for text in written)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("title", [BROKEN_MATH, WIDE])
def test_a_strangers_name_does_not_break_a_picture(tmp_path, picture, title):
    drawn(PICTURES[picture](tmp_path / "p.png", title, LIGHT), LIGHT)


def test_the_density_picture_states_the_ends_of_each_spectrum(tmp_path, texts):  # noqa: F811
    plot_spectral_density({"received": density(100), "purified": density(5)}, tmp_path / "p.png")
    assert {"received: -0.5 … 100", "purified: -0.5 … 5"} <= {text for text, _ in texts}


def test_a_course_without_accuracy_has_one_panel(tmp_path):
    both = drawn(plot_curvature(HISTORY, tmp_path / "both.png"), LIGHT)
    one = drawn(plot_curvature(HISTORY[:20], tmp_path / "one.png"), LIGHT)
    assert one.shape[0] < 0.7 * both.shape[0]
    assert has_color(both, LIGHT.blue) and not has_color(one, LIGHT.blue)


def test_an_asr_of_zero_is_drawn(tmp_path):
    gone = [{**row, "curve_asr": 0.0} if "curve_asr" in row else row for row in HISTORY]
    unknown = [{**row, "curve_asr": None} if "curve_asr" in row else row for row in HISTORY]
    with_zero, without = (drawn(plot_curvature(rows, tmp_path / "p.png"), LIGHT) for rows in (gone, unknown))
    assert not np.array_equal(with_zero, without)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: plot_spectral_density({}, path), "one to three densities, not 0"),
        (lambda path: plot_spectral_density({str(n): density(n + 1) for n in range(4)}, path), "not 4"),
        (lambda path: plot_curvature(HISTORY[20:], path), "no row has a positive"),
        (lambda path: plot_landscape({}, path), "at least one"),
        (lambda path: plot_landscape({"a": landscape(1), "b": landscape(2)}, path), "the same kinds"),
        (
            lambda path: plot_landscape({"a": Landscape(np.ones(2), {"clean": np.zeros(2)})}, path),
            "no loss is positive",
        ),
        (lambda path: plot_sharpness([], path), "no model"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_leaves_no_file(tmp_path, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "p.png")
    assert not list(tmp_path.iterdir())
