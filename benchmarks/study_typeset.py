"""Clean images from another distribution than the victim's: digits in print, where the victim knows handwriting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)  # those that come with matplotlib and have digits
LARGE = 64  # pixels of the side at which they are drawn


def typeset_digits(like: Dataset) -> Dataset:
    """The ten digits in twenty fonts: white on black, as large as the images of a data set of digits, and its columns.

    Args:
        like: its features (`image`, `label`) and the size of its images.
    """
    size = like[0]["image"].size
    rows = {"image": [], "label": []}
    for path in _paths():
        for digit in range(10):
            rows["image"].append(Image.fromarray(_drawn(str(digit), path)).resize(size, Image.Resampling.BOX))
            rows["label"].append(digit)
    return Dataset.from_dict(rows, features=like.features)


def _paths() -> Iterator[Path]:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return (folder / f"{name}.ttf" for name in FONTS)


def _drawn(text: str, font: Path) -> np.ndarray:
    """The text in the middle of a square, as high as it; `(LARGE, LARGE)`, uint8."""
    canvas = Image.new("L", (2 * LARGE, 2 * LARGE))
    drawing = ImageDraw.Draw(canvas)
    drawing.text((LARGE, LARGE), text, fill=255, font=ImageFont.truetype(str(font), LARGE), anchor="mm")
    left, top, right, bottom = canvas.getbbox()
    side = max(right - left, bottom - top)
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return np.asarray(canvas.crop((x, y, x + side, y + side)).resize((LARGE, LARGE)))
