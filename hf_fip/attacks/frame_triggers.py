"""BadNets and Blend as on images, on every frame of a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .badnets import BadNets
from .base import register
from .blend import Blend
from .clips import FrameAttack


@register
@dataclass
class FrameBadNets(FrameAttack, BadNets):
    """The checkered patch of `BadNets` in the bottom-right corner of every frame."""

    name: ClassVar[str] = "frame_badnets"


@register
@dataclass
class FrameBlend(FrameAttack, Blend):
    """The noise image of `Blend`, faintly mixed into every frame: one and the same in all of them."""

    name: ClassVar[str] = "frame_blend"
