"""Backdoor attacks: triggers, poisoned training sets and triggered test sets. One file an attack."""

from .badnets import BadNets
from .base import Attack, BaseAttack, attack_class, attack_names, input_kinds, load_attack, make_attack
from .blend import Blend
from .bppa import BPPA
from .clean_image import CleanImage
from .clips import poison_clips, trigger_clips
from .composite import Composite
from .dynamic import DynAll, DynOne
from .feature_space import FeatureSpace
from .frame_triggers import FrameBadNets, FrameBlend
from .issba import ISSBA
from .label_consistent import LabelConsistent
from .lira import LIRA
from .object_patch import ObjectPatch
from .objects import ObjectAttack
from .pcba import PCBA
from .pointba import PointBABall, PointBARotation
from .poison import poison, trigger
from .poison_objects import poison_objects, trigger_objects
from .poison_text import poison_pairs, trigger_pairs
from .sentences import OneToMany, OneToOne, SentenceAttack
from .sig import SIG
from .trojan import TrojAll, TrojOne
from .universal_trigger import UniversalTrigger
from .wanet import WaNet

__all__ = [
    "FeatureSpace",
    "FrameBadNets",
    "FrameBlend",
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
    "CleanImage",
    "Blend",
    "DynAll",
    "DynOne",
    "LabelConsistent",
    "ObjectAttack",
    "ObjectPatch",
    "OneToMany",
    "OneToOne",
    "SentenceAttack",
    "TrojAll",
    "TrojOne",
    "UniversalTrigger",
    "WaNet",
    "attack_class",
    "attack_names",
    "input_kinds",
    "load_attack",
    "make_attack",
    "poison",
    "poison_clips",
    "poison_objects",
    "poison_pairs",
    "trigger",
    "trigger_clips",
    "trigger_objects",
    "trigger_pairs",
]
