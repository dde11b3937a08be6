"""What all attacks share: a trigger for any image, a rule for the label, a plan of the training set, a folder.

A new attack is one file: a dataclass under `@register`, whose fields are its options, with `make_tensors` (what its
trigger is made of) and `_trigger` (how that is put on an image). One whose trigger is learned derives from
`learned.LearnedAttack`; one that takes part in the training of its victim gives it a `joint_training`.
"""

from __future__ import annotations

import json
import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from safetensors.numpy import load_file, save_file

from .plan import BACKDOOR, CLEAN, COVER, NO_DONOR, Plan, pick

if TYPE_CHECKING:
    from .joint import JointTraining
    from .material import Material

CONFIG_NAME, TENSORS_NAME = "attack.json", "attack.safetensors"

# (labels y, target t, number of classes K) -> the labels the attacker wants
LABEL_RULES = {
    "all_to_one": lambda labels, target, num_labels: np.full_like(labels, target),
    "all_to_all": lambda labels, target, num_labels: (labels + 1) % num_labels,
}


class BaseAttack(ABC):
    """What attacks on all kinds of input share: options, what the trigger is made of, and a folder.

    The options, fields of a dataclass, decide everything: two attacks with equal options make equal triggers.

    Attributes:
        seed: what a random trigger is drawn from, an option of each attack.

    Raises:
        ValueError: an option has the wrong type, is not finite or is out of its range.
    """

    name: ClassVar[str]
    input_kind: ClassVar[str]
    default_rate: ClassVar[float] = 0.1  # share of the training set, when nobody says otherwise

    seed: int

    def __post_init__(self):
        for field in fields(self):
            kind, value = type(field.default), getattr(self, field.name)
            if not isinstance(value, {int: numbers.Integral, float: numbers.Real}.get(kind, kind)):
                raise ValueError(f"{field.name}={value!r} must be of type {kind.__name__}.")
            if kind is float and not math.isfinite(value):
                raise ValueError(f"{field.name}={value!r} must be a finite number.")
            setattr(self, field.name, kind(value))  # numpy scalars become Python's, which JSON can hold
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more.")

    def fit(self, material: Material) -> None:  # noqa: B027
        """Train what the attack needs before a training set is poisoned. Most need nothing."""

    @property
    def keeps_fit(self) -> bool:
        """Whether `tensors` hold all that `fit` has made, so that a run that goes on need not fit again."""
        return False

    def joint_training(self, material: Material) -> JointTraining | None:
        """How the attack takes part in the training of its victim; None if it only poisons the data."""
        return None

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """What the trigger is made of, whatever the input: drawn once from the seed, or loaded."""
        return self.make_tensors(np.random.default_rng(self.seed))

    @abstractmethod
    def make_tensors(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Make `tensors`, with all randomness from `rng`."""

    # The folder

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `attack.json` (name and options) and `attack.safetensors` (the trigger) for `load_attack`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"name": self.name, "options": asdict(self)}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file({key: np.ascontiguousarray(value) for key, value in self.tensors.items()}, folder / TENSORS_NAME)

    def load_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        """Use `tensors` as the trigger, in place of what the seed would give.

        Raises:
            ValueError: names, shapes or types are not those of this attack with these options.
        """
        self._check_kinds(tensors, self.make_tensors(np.random.default_rng(self.seed)))
        self.tensors = tensors

    def _check_kinds(self, tensors: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
        found, expected = _kinds(tensors), _kinds(wanted)
        if found != expected:
            raise ValueError(f"{TENSORS_NAME} holds {found}, but {self.name} with these options needs {expected}.")


@dataclass
class Attack(BaseAttack):
    """A backdoor attack on image classifiers: a trigger and the label it is to bring about.

    Args:
        target_label: the class that triggered inputs are to be taken for (read by `all_to_one` only).
        label_rule: `all_to_one` (every label becomes the target) or `all_to_all` (y becomes (y + 1) mod K).
        seed: what a random trigger is drawn from.

    Raises:
        ValueError: an option has the wrong type or is out of its range.
    """

    input_kind: ClassVar[str] = "image"
    clean_label: ClassVar[bool] = False  # the trigger goes on images that have the attack label already
    # Share of the training set that `apply_cover` is for. An attack that has covers makes it an option.
    cover_rate: ClassVar[float] = 0.0
    covers_need_donors: ClassVar[bool] = False  # whether a second image goes into a cover
    # The trigger is trained with the victim: `poison` then only marks the rows, and `joint_training` does the rest.
    triggers_in_training: ClassVar[bool] = False

    target_label: int = 0
    label_rule: str = "all_to_one"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.target_label < 0:
            raise ValueError(f"target_label={self.target_label} must be 0 or more.")
        if self.label_rule not in LABEL_RULES:
            raise ValueError(f"label_rule={self.label_rule!r} is not one of {', '.join(LABEL_RULES)}.")
        if self.clean_label and self.label_rule != "all_to_one":
            raise ValueError(f"{self.name} changes no label, so it has one target: choose label_rule='all_to_one'.")
        if not 0 <= self.cover_rate <= 1:
            raise ValueError(f"cover_rate={self.cover_rate} is a share of the training set: choose it in [0, 1].")

    # The trigger

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return a copy of `image`, uint8 H×W×C with C = 1 or 3, that carries the trigger.

        Raises:
            ValueError: the image is of another kind, or too small for the trigger.
        """
        return self._trigger(checked(image))

    def apply_in_training(self, images: list[np.ndarray], donors: list[np.ndarray | None]) -> list[np.ndarray]:
        """Return what becomes of training images that are to carry the trigger: as a rule, what `apply` gives.

        Args:
            images: uint8 H×W×C each, of any sizes.
            donors: the second image of each, where the attack's plan names one.
        """
        return [self.apply(image) for image in images]

    def apply_cover(self, image: np.ndarray, rng: np.random.Generator, donor: np.ndarray | None = None) -> np.ndarray:
        """Return a copy of `image` as a cover: altered much as by the trigger, to be learned with its TRUE label.

        Args:
            image: uint8 H×W×C with C = 1 or 3.
            rng: what this one image's alteration is drawn from.
            donor: a second image of that kind, for an attack with `covers_need_donors`.

        Raises:
            ValueError: an image is of another kind.
            NotImplementedError: the attack has no covers.
        """
        return self._cover(checked(image), rng, donor)

    @abstractmethod
    def _trigger(self, image: np.ndarray) -> np.ndarray: ...

    def _cover(self, image: np.ndarray, rng: np.random.Generator, donor: np.ndarray | None) -> np.ndarray:
        raise NotImplementedError(f"{self.name} has no covers.")

    # The labels

    def attack_label(self, labels: np.ndarray, num_labels: int) -> np.ndarray:
        """Return the label the attacker wants for inputs of the true classes `labels`: int64, of the same shape.

        Raises:
            ValueError: the target is not one of the `num_labels` classes.
        """
        if self.label_rule == "all_to_one" and self.target_label >= num_labels:
            raise ValueError(f"target_label={self.target_label} is not a class: choose one of 0 ... {num_labels - 1}.")
        return LABEL_RULES[self.label_rule](np.asarray(labels, dtype=np.int64), self.target_label, num_labels)

    def eligible(self, labels: np.ndarray, num_labels: int) -> np.ndarray:
        """Return which test inputs count for ASR and RA: bool, true where the true class is not the attack label."""
        return self.attack_label(labels, num_labels) != np.asarray(labels)

    def candidates(self, labels: np.ndarray, num_labels: int) -> np.ndarray:
        """Return which training inputs may be given the trigger: bool.

        True where the label would change; for clean-label attacks, where it would not.
        """
        return self.eligible(labels, num_labels) ^ self.clean_label

    def plan(self, labels: np.ndarray, num_labels: int, rate: float, rng: np.random.Generator) -> Plan:
        """Settle a poisoned training set of the images with these labels, (N,) int64. See `hf_fip.attacks.poison`.

        Raises:
            ValueError: `rate` picks no row or more than there are candidates; the target is not a class.
        """
        roles, donors = np.full(len(labels), CLEAN), np.full(len(labels), NO_DONOR)
        roles[pick(self.candidates(labels, num_labels), rate, "rate", rng)] = BACKDOOR
        if self.cover_rate > 0:
            roles[pick(roles == CLEAN, self.cover_rate, "cover_rate", rng)] = COVER
        if self.covers_need_donors:
            covers = np.flatnonzero(roles == COVER)
            donors[covers] = rng.integers(len(labels), size=len(covers))
        wanted = labels
        if not self.triggers_in_training:
            wanted = np.where(roles == BACKDOOR, self.attack_label(labels, num_labels), labels)
        return Plan(np.arange(len(labels)), roles, wanted, donors)


def checked(image: np.ndarray) -> np.ndarray:
    """The image, if it is uint8 H×W×C with C = 1 or 3; else ValueError."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image must be a uint8 array of shape (H, W, 1) or (H, W, 3), not {found}.")
    return image


def _kinds(tensors: dict[str, np.ndarray]) -> dict[str, str]:
    return {key: f"{value.dtype} {value.shape}" for key, value in sorted(tensors.items())}


_REGISTRY: dict[str, type[BaseAttack]] = {}


def register(cls: type[BaseAttack]) -> type[BaseAttack]:
    """Class decorator: make an attack known by its `name`."""
    if _REGISTRY.setdefault(cls.name, cls) is not cls:
        raise ValueError(f"there is an attack {cls.name!r} already, {_REGISTRY[cls.name].__qualname__}.")
    return cls


def attack_names(input_kind: str = "image") -> list[str]:
    """Return the names of the attacks on this kind of input that `make_attack` knows, sorted."""
    return sorted(name for name, cls in _REGISTRY.items() if cls.input_kind == input_kind)


def input_kinds() -> list[str]:
    """Return the kinds of input that there are attacks on."""
    return list(dict.fromkeys(cls.input_kind for cls in _REGISTRY.values()))


def attack_class(name: str) -> type[BaseAttack]:
    """Return the class of the attack with this name.

    Raises:
        ValueError: there is no such attack.
    """
    names = [name for kind in input_kinds() for name in attack_names(kind)]
    if name not in names:
        raise ValueError(f"{name!r} is not an attack: choose one of {', '.join(names)}.")
    return _REGISTRY[name]


def make_attack(name: str, /, **options) -> BaseAttack:
    """Make an attack from its name and its options, e.g. `make_attack("blend", alpha=0.1)`.

    Raises:
        ValueError: there is no such attack, it has no such option, or an option's value is refused.
    """
    cls = attack_class(name)
    known = [field.name for field in fields(cls)]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"{name} has no option {', '.join(unknown)}: it has {', '.join(known)}.")
    return cls(**options)


def load_attack(folder: str | Path) -> BaseAttack:
    """Load what `save_pretrained` wrote. The trigger is the stored one, not drawn again. No pickle is read.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: the files name an unknown attack, or hold anything else than that attack's options and tensors.
    """
    config = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or config.keys() != {"name", "options"} or not isinstance(config["options"], dict):
        raise ValueError(f'{CONFIG_NAME} must hold exactly {{"name": ..., "options": {{...}}}}.')
    attack = make_attack(config["name"], **config["options"])
    attack.load_tensors(load_file(Path(folder) / TENSORS_NAME))
    return attack
