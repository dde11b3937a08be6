"""A generated data set of point clouds: simple bodies in many proportions, tilted a little, with noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SHAPES_POINTS = 256  # of each cloud
_CLOUDS = {"train": 60, "test": 30}  # of each class
_NOISE, _TILT = 0.02, 0.2  # standard deviations, of a coordinate and of an angle in radians

Sampler = Callable[[np.random.Generator, int], np.ndarray]


def _sphere(rng: np.random.Generator, count: int) -> np.ndarray:
    points = rng.standard_normal((count, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _cube(rng: np.random.Generator, count: int) -> np.ndarray:
    points = rng.uniform(-1, 1, (count, 3))
    points[np.arange(count), rng.integers(3, size=count)] = rng.choice([-1.0, 1.0], count)
    return points


def _round(radius: np.ndarray, angle: np.ndarray, height: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)


def _cylinder(rng: np.random.Generator, count: int) -> np.ndarray:
    on_cap, angle = rng.random(count) < 1 / 3, rng.uniform(0, 2 * np.pi, count)
    radius = np.where(on_cap, np.sqrt(rng.random(count)), 1.0)
    height = np.where(on_cap, rng.choice([-1.0, 1.0], count), rng.uniform(-1, 1, count))
    return _round(radius, angle, height)


def _cone(rng: np.random.Generator, count: int) -> np.ndarray:
    on_base, radius = rng.random(count) < 0.3, np.sqrt(rng.random(count))
    return _round(radius, rng.uniform(0, 2 * np.pi, count), np.where(on_base, -1.0, 1 - 2 * radius))


def _torus(rng: np.random.Generator, count: int) -> np.ndarray:
    tube, angle = rng.uniform(0, 2 * np.pi, (2, count))
    return _round(1 + 0.35 * np.cos(tube), angle, 0.35 * np.sin(tube))


def _helix(rng: np.random.Generator, count: int) -> np.ndarray:
    along = rng.random(count)
    return _round(np.full(count, 0.6), 6 * np.pi * along, 2 * along - 1)


def _pyramid(rng: np.random.Generator, count: int) -> np.ndarray:
    points = _cube(rng, count)
    points[:, :2] *= np.where(points[:, 2:] > -1, (1 - points[:, 2:]) / 2, 1)
    return points


def _cross(rng: np.random.Generator, count: int) -> np.ndarray:
    points = 0.15 * rng.uniform(-1, 1, (count, 3))
    points[np.arange(count), rng.integers(3, size=count)] = rng.uniform(-1, 1, count)
    return points


SHAPES: dict[str, Sampler] = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
    "helix": _helix,
    "pyramid": _pyramid,
    "cross": _cross,
}


def make_shapes(seed: int = 0) -> dict[str, tuple[list[np.ndarray], list[str]]]:
    """Clouds of 256 points and the names of their shapes, for each split: 60 a shape to train on, 30 to test on.

    Each is stretched by factors between 0.7 and 1.3, tilted and noisy. They are not normalised yet.
    """
    rng, made = np.random.default_rng(seed), {}
    for split, count in _CLOUDS.items():
        names = [name for name in SHAPES for _ in range(count)]
        made[split] = [_body(SHAPES[name], rng) for name in names], names
    return made


def _body(sampler: Sampler, rng: np.random.Generator) -> np.ndarray:
    points = sampler(rng, SHAPES_POINTS) * rng.uniform(0.7, 1.3, 3)
    x, y, z = rng.normal(0, _TILT, 3)
    # Rodrigues' formula to the first order, made orthogonal again
    turn, _ = np.linalg.qr(np.eye(3) + np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]))
    turn *= np.sign(np.diag(turn))
    return (points @ turn.T + rng.normal(0, _NOISE, points.shape)).astype(np.float32)
