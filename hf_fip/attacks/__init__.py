"""Backdoor attacks: triggers, poisoned training sets and triggered test sets. One file an attack."""

from .badnets import BadNets
from .base import Attack, BaseAttack, attack_class, attack_names, input_kinds, load_attack, make_attack
from .blend import Blend
from .bppa import BPPA
from .composite import Composite
from .dynamic import DynAll, DynOne
from .feature_space import FeatureSpace
from .issba import ISSBA
from .label_consistent import LabelConsistent
from .lira import LIRA
from .pcba import PCBA
from .pointba import PointBABall, PointBARotation
from .poison import poison, trigger
from .poison_text import poison_pairs, trigger_pairs
from .sentences import OneToMany, OneToOne, SentenceAttack
from .sig import SIG
from .trojan import TrojAll, TrojOne
from .wanet import WaNet

__all__ = [
    "FeatureSpace",
    "ISSBA",
    "Composite",
    "BPPA",
    "LIRA",
    "PCBA",
    "PointBABall",
    "PointBARotation",
    "SIG",
    "Attack",
    "BaseAttack",
    "BadNets",
    "Blend",
    "DynAll",
    "DynOne",
    "LabelConsistent",
    "OneToMany",
    "OneToOne",
    "SentenceAttack",
    "TrojAll",
    "TrojOne",
    "WaNet",
    "attack_class",
    "attack_names",
    "input_kinds",
    "load_attack",
    "make_attack",
    "poison",
    "poison_pairs",
    "trigger",
    "trigger_pairs",
]
