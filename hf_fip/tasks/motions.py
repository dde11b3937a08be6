"""A generated data set of clips: a disc or a square that moves, and only its motion tells the class."""

from __future__ import annotations

import numpy as np

FRAMES, SIDE = 8, 16  # of a clip; pixels of a frame
_CLIPS = {"train": 100, "test": 40}  # of each class
_NOISE = 6.0  # standard deviation, in pixel values
_KNOTS = 4  # a side of the grid that a background is drawn on

# Per class: the step of the centre from frame to frame, as a share of the way; or what else moves.
_STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
_TURNS = {"clockwise": 1, "anticlockwise": -1}
_GROWTH = {"growing": 1, "shrinking": -1}
MOTIONS = (*_STEPS, *_TURNS, *_GROWTH)


def make_motions(seed: int = 0) -> dict[str, tuple[list[np.ndarray], list[str]]]:
    """Clips, uint8 (8, 16, 16, 3), and the names of their motions: 100 a motion to train on, 40 to test on.

    Shape, size, place, speed, colours, background and noise are drawn; a single frame does not tell the class.
    """
    rng, made = np.random.default_rng(seed), {}
    for split, count in _CLIPS.items():
        names = [name for name in MOTIONS for _ in range(count)]
        made[split] = [_clip(name, rng) for name in names], names
    return made


def _clip(motion: str, rng: np.random.Generator) -> np.ndarray:
    time = np.linspace(-0.5, 0.5, FRAMES)
    centre = np.full((FRAMES, 2), (SIDE - 1) / 2) + rng.uniform(-2, 2, 2)
    radius = np.full(FRAMES, rng.uniform(2.0, 3.2))
    if motion in _STEPS:
        centre += time[:, None] * rng.uniform(7, 11) * np.array(_STEPS[motion])
    elif motion in _TURNS:
        angle = rng.uniform(0, 2 * np.pi) + _TURNS[motion] * rng.uniform(1.2, 1.8) * np.pi * time
        centre += rng.uniform(3.0, 4.5) * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    else:
        radius += _GROWTH[motion] * time * rng.uniform(2.5, 3.5) + 0.5
    inside = _shape(centre, radius, round_=rng.random() < 0.5)[..., None]

    dark, light = rng.uniform(0, 90, 3), rng.uniform(165, 255, 3)
    object_, background = (dark, light) if rng.random() < 0.5 else (light, dark)
    ground = background + _smooth(rng.normal(0, 25, (_KNOTS, _KNOTS, 3)))
    clip = inside * object_ + (1 - inside) * ground + rng.normal(0, _NOISE, (FRAMES, SIDE, SIDE, 3))
    return np.rint(clip).clip(0, 255).astype(np.uint8)


def _shape(centre: np.ndarray, radius: np.ndarray, round_: bool) -> np.ndarray:
    """How much of each pixel the shape covers, (frames, side, side) in [0, 1]."""
    pixels = np.arange(SIDE)
    down, across = (np.abs(pixels - centre[:, axis, None]) for axis in (0, 1))
    down, across = down[:, :, None], across[:, None, :]
    distance = np.hypot(down, across) if round_ else np.maximum(down, across)
    return (radius[:, None, None] + 0.5 - distance).clip(0, 1)


def _smooth(knots: np.ndarray) -> np.ndarray:
    """The values on a coarse grid interpolated linearly to (side, side, channels)."""
    places, coarse = np.linspace(0, len(knots) - 1, SIDE), np.arange(len(knots))
    weights = (1 - np.abs(places[:, None] - coarse)).clip(0)  # (side, knots)
    return np.einsum("ia,jb,abc->ijc", weights, weights, knots)
