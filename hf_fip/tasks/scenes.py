"""Scenes that are generated, not downloaded: a few coloured shapes on a cloudy ground, with their boxes.

Colour, size and place say nothing of a class, only the shape does. A shape hides at most a little of another.
"""

from __future__ import annotations

import numpy as np
import PIL.Image
import PIL.ImageDraw

SHAPES = ("disc", "square", "triangle", "cross", "ring")
SIDE = 64  # pixels of a scene
_SIZES = (16, 28)  # least and largest side of a shape, in pixels
_MOST = 4  # shapes in a scene
_OVERLAP = 0.1  # largest share of the smaller of two boxes that they have in common
_FINER = 4  # shapes are drawn so much larger, for smooth edges


def scenes(count: int, seed: int = 0) -> tuple[list[np.ndarray], list[list[list[float]]], list[list[int]]]:
    """So many scenes, drawn from `seed`, of one to four shapes each.

    Returns:
        Images, uint8 64×64×3; for each the boxes, [x, y, width, height] in pixels; and their classes, places in
        `SHAPES`.
    """
    rng = np.random.default_rng(seed)
    images, boxes, classes = zip(*(_scene(rng) for _ in range(count)), strict=True)
    return list(images), list(boxes), list(classes)


def _scene(rng: np.random.Generator) -> tuple[np.ndarray, list[list[float]], list[int]]:
    image, boxes, classes = _ground(rng), [], []
    for _ in range(rng.integers(1, _MOST + 1)):
        kind = int(rng.integers(len(SHAPES)))
        side = int(rng.integers(_SIZES[0], _SIZES[1] + 1))
        x, y = rng.integers(0, SIDE - side + 1, size=2).tolist()
        if any(_shared((x, y, side, side), box) > _OVERLAP for box in boxes):
            continue
        ground = image.crop((x, y, x + side, y + side)).resize((1, 1), PIL.Image.Resampling.BOX).getpixel((0, 0))
        image.paste(_colour(rng, ground), (x, y), _mask(SHAPES[kind], side))
        boxes.append([float(x), float(y), float(side), float(side)])
        classes.append(kind)
    return np.asarray(image), boxes, classes


def _ground(rng: np.random.Generator) -> PIL.Image.Image:
    knots = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    smooth = PIL.Image.fromarray(knots).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth, dtype=np.float64) * 0.6 + 50 + rng.normal(0, 8, (SIDE, SIDE, 3))
    return PIL.Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _colour(rng: np.random.Generator, ground: tuple[int, ...]) -> tuple[int, ...]:
    """One that can be told from the ground."""
    while True:
        colour = rng.integers(0, 256, 3)
        if np.abs(colour - np.asarray(ground)).sum() > 200:
            return tuple(colour.tolist())


def _mask(shape: str, side: int) -> PIL.Image.Image:
    """The shape as a mask of side × side pixels; it touches all four edges."""
    end = side * _FINER - 1
    large = PIL.Image.new("L", (end + 1, end + 1))
    pen = PIL.ImageDraw.Draw(large)
    if shape == "disc":
        pen.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        pen.rectangle((0, 0, end, end), fill=255)
    elif shape == "triangle":
        pen.polygon(((end / 2, 0), (0, end), (end, end)), fill=255)
    elif shape == "cross":
        pen.rectangle((0, end / 3, end, 2 * end / 3), fill=255)
        pen.rectangle((end / 3, 0, 2 * end / 3, end), fill=255)
    else:
        pen.ellipse((0, 0, end, end), fill=255)
        pen.ellipse((end / 4, end / 4, 3 * end / 4, 3 * end / 4), fill=0)
    return large.resize((side, side), PIL.Image.Resampling.BOX)


def _shared(first: tuple, second: list[float]) -> float:
    """What two boxes have in common, as a share of the smaller one."""
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    return max(0, width) * max(0, height) / min(first[2] * first[3], second[2] * second[3])
