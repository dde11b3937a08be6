"""Backdoor attacks: triggers, poisoned training sets and triggered test sets. One file an attack."""

from .badnets import BadNets
from .base import Attack, attack_names, load_attack, make_attack
from .blend import Blend
from .poison import poison, trigger
from .wanet import WaNet

__all__ = ["Attack", "BadNets", "Blend", "WaNet", "attack_names", "load_attack", "make_attack", "poison", "trigger"]
