"""The arguments that the recipes of all tasks share."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import HfArgumentParser

from ..attacks import attack_names, make_attack
from ..baselines import method_names
from ..config import FIPConfig
from ..hub.safety import Trust

CLEAN_FRACTION = 0.2  # of the training set, kept aside for the defender by a victim made here

FIP = "fip"  # --method fip
BENIGN = "none"  # --attack none

# Evaluation needs no gradients; memory is pinned for the copy to an accelerator, where there is one.
COMMON_DEFAULTS = {
    "per_device_eval_batch_size": 256,
    "dataloader_pin_memory": torch.accelerator.is_available(),
    "disable_tqdm": not sys.stderr.isatty(),
}


@dataclass
class DataArguments:
    """Which data, and which of them the defender has. A task gives `dataset_name` its default in a subclass."""

    dataset_name: str
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})
    train_split: str | None = field(default=None, metadata={"help": "Split to train on. Guessed by default."})
    test_split: str | None = field(
        default=None, metadata={"help": "Split to measure on. Guessed; without one, a quarter of the rows."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many training samples only."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Use this many test samples only."})
    clean_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training set that the defender has. Default: a fifth for a victim made here, "
            "which never sees them; for a given model all, or what it is known to have kept aside."
        },
    )
    clean_samples: int | None = field(default=None, metadata={"help": "The same as a number; wins over the share."})
    split_seed: int | None = field(
        default=None, metadata={"help": "Seed of the clean split. Default: the victim's own, else --seed."}
    )

    def selection(self) -> dict[str, Any]:
        """Which part of the data set, as every loader takes it."""
        names = ("train_split", "test_split", "max_train_samples", "max_test_samples")
        return {name: getattr(self, name) for name in names} | {"revision": self.dataset_revision}

    def clean_count(self, training_samples: int, otherwise: int | None = None) -> int:
        """The size of the clean split: what was asked for, else `otherwise`, else a fifth.

        Raises:
            ValueError: when the share is not between 0 and 1 or the split would be empty.
        """
        if self.clean_samples is not None:
            if self.clean_samples < 1:
                raise ValueError(f"--clean_samples={self.clean_samples} has to be at least 1.")
            return self.clean_samples
        if self.clean_fraction is None and otherwise is not None:
            return otherwise
        fraction = CLEAN_FRACTION if self.clean_fraction is None else self.clean_fraction
        if not 0 < fraction < 1:
            raise ValueError(f"--clean_fraction={fraction} has to lie between 0 and 1.")
        count = round(fraction * training_samples)
        if count < 1:
            raise ValueError(
                f"--clean_fraction={fraction} of {training_samples} training samples is an empty clean "
                "split: raise it, or set --clean_samples."
            )
        return count


def check_least(arguments, **least: int) -> None:
    """Raise a ValueError for an argument, by its name, that is below the least it can be."""
    for name, number in least.items():
        if getattr(arguments, name) < number:
            raise ValueError(f"--{name}={getattr(arguments, name)} has to be at least {number}.")


def attack_field(input_kind: str, default: str) -> str | None:
    """The argument `--attack` of a task: attacks on its kind of input, and which one is meant when none is named."""
    return field(
        default=None,
        metadata={
            "help": f"{', '.join(attack_names(input_kind))}; or none, for a benign model to compare with. Default: "
            f"{default} for a victim made here; for a given model the attack.json in its folder, without which no "
            "attack is measured."
        },
    )


@dataclass
class AttackArguments:
    """The backdoor: what ASR is measured with. A task of other inputs than images replaces the first three lines.

    Where victims are trained, its `PoisonArguments` come of both classes.
    """

    input_kind: ClassVar[str] = "image"
    default_attack: ClassVar[str] = "badnets"
    attack: str | None = attack_field(input_kind, default_attack)
    attack_options: str | None = field(
        default=None, metadata={"help": "Options of the attack as name=value,name=value, e.g. alpha=0.6."}
    )
    target_label: int = field(default=0, metadata={"help": "Number of the class the attacker wants."})

    def make(self, num_labels: int):
        """The attack; None for a benign model.

        Raises:
            ValueError: for an unknown attack or option, or a target that is not one of the classes.
        """
        if self.attack == BENIGN:
            if self != type(self)(BENIGN):
                raise ValueError("--attack none is no attack: it has no options, target or poison rate.")
            return None
        if not 0 <= self.target_label < num_labels:
            raise ValueError(
                f"--target_label={self.target_label} is not a class: the data have {num_labels}, "
                f"0 to {num_labels - 1}."
            )
        name, names = self.attack or self.default_attack, attack_names(self.input_kind)
        if name not in names:
            raise ValueError(f"{name!r} is not an attack on {self.input_kind} data: choose one of {', '.join(names)}.")
        return make_attack(name, **self._options())

    def _options(self) -> dict:
        options = {"target_label": self.target_label}
        for pair in filter(None, (self.attack_options or "").split(",")):
            name, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"--attack_options: {pair!r} is not name=value.")
            if name.strip() in options:
                raise ValueError(f"--attack_options: {name.strip()} is set twice (the target by --target_label).")
            options[name.strip()] = _number_or_text(value.strip())
        return options


@dataclass
class PoisonArguments(AttackArguments):
    """[`AttackArguments`] where a victim is trained."""

    poison_rate: float | None = field(
        default=None,
        metadata={"help": "Share of the training set that is poisoned. Default: the attack's own, mostly 0.1."},
    )
    clean_model: str | None = field(
        default=None,
        metadata={
            "help": "A model trained on clean data of the same kind, for attacks that learn their trigger on one. "
            "Default: one is trained first, as the victim is, without the poison."
        },
    )


@dataclass
class LoadArguments:
    """A model that is there already. A task says in a subclass what else its models are loaded with."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A Hub id or folder (safetensors only, no remote code), or the folder of a PEFT adapter."},
    )
    model_revision: str | None = field(
        default=None,
        metadata={
            "help": "Branch, tag or commit of a Hub model, or of the one that the folder of an adapter names. "
            "Default: main, or the commit that the adapter was made on."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that comes with the model. Read it first."}
    )
    allow_pickle: bool = field(
        default=False,
        metadata={"help": "Convert a pytorch_model.bin, in a process of its own, where there are no safetensors."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace what an earlier run left in --output_dir."}
    )
    json: bool = field(
        default=False, metadata={"help": "Print the report as JSON, and everything else on the error stream."}
    )

    def trust(self) -> Trust:
        """What the user vouches for."""
        return Trust(self.trust_remote_code, self.allow_pickle)


@dataclass
class ModelArguments(LoadArguments):
    """The model to be purified. A task says in a subclass which architectures it makes victims of."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A Hub id or folder (safetensors only, no remote code). Left out: a small backdoored victim is "
            "trained first and kept for the next time."
        },
    )
    architecture: str = ""
    victims_dir: str = field(default="outputs/victims", metadata={"help": "Where victims made here are kept."})
    augment: bool = field(default=False, metadata={"help": "Change training samples at random."})
    hub_create_pr: bool = field(
        default=False, metadata={"help": "With --push_to_hub, open a pull request in place of a commit."}
    )
    hub_base_model: str | None = field(
        default=None,
        metadata={"help": "With --push_to_hub and an adapter, the Hub id of the received model if it came from disk."},
    )


@dataclass
class MethodArguments:
    """What the backdoor is taken out by, and what its settings may be chosen by."""

    method: str = field(
        default=FIP,
        metadata={
            "help": "FIP, or another purifier to compare it with, as in its paper or in BackdoorBench: each has "
            "arguments of its own, see --method nad --help.",
            "choices": (FIP, *method_names()),
        },
    )
    held_out_clean_samples: int = field(
        default=0,
        metadata={
            "help": "Samples taken out of the clean split to measure on (validation_accuracy, or the task's own "
            "metric, in report.json): choose settings by them, never by ASR or the test set."
        },
    )
    curvature_every: int = field(
        default=0,
        metadata={
            "help": "Measure λ_max and Tr H of the loss on clean samples before, after and at every so many updates: "
            "in report.json, the card and a picture. 0 is never."
        },
    )

    def __post_init__(self):
        check_least(self, held_out_clean_samples=0, curvature_every=0)


@dataclass
class AdapterArguments:
    """Fast FIP: what is trained in place of the weights, and saved in place of the model."""

    adapter: str = field(
        default="none",
        metadata={
            "help": "'singular' shifts only the singular values of the weights (Fast FIP) and saves a small adapter. "
            "It has defaults of its own: see --adapter singular --help.",
            "choices": ("none", "singular"),
        },
    )
    adapter_rank: int | None = field(
        default=None, metadata={"help": "Shift so many of the largest singular values of each layer. Default: all."}
    )
    adapter_target_modules: str = field(
        default="all", metadata={"help": "Layers to adapt: 'all', name,name or a regular expression."}
    )
    adapter_train_norms: bool = field(
        default=True, metadata={"help": "Train the norm layers too; the adapter file then holds them."}
    )
    adapter_relative: bool = field(
        default=True,
        metadata={"help": "Shift by shares of the singular values; else in units of the weight, as in the paper."},
    )
    adapter_save_basis: bool = field(
        default=False, metadata={"help": "Save U and V too: about twice the size of the model, and loads faster."}
    )

    def make(self):
        """The PEFT config; None without an adapter.

        Raises:
            ValueError: for options of an adapter that is not there.
        """
        if self.adapter == "none":
            if self != AdapterArguments():
                raise ValueError("--adapter_* are options of an adapter: add --adapter singular.")
            return None
        from ..singular import SingularValueConfig

        targets = self.adapter_target_modules
        return SingularValueConfig(
            target_modules=targets.split(",") if "," in targets else targets,
            rank=self.adapter_rank,
            train_norms=self.adapter_train_norms,
            relative=self.adapter_relative,
            save_basis=self.adapter_save_basis,
        )


@dataclass
class VictimConfig(FIPConfig):
    """How a victim is trained: a [`FIPConfig`] without FIP (set eta_f for an attacker who adapts to it)."""

    eta_f: float = field(default=0.0, metadata={"help": "Weight of Tr F; above 0 the attacker adapts to FIP."})
    optim: str = field(default="adamw_torch", metadata={"help": "The optimizer to use."})
    learning_rate: float = field(default=2e-3, metadata={"help": "The initial learning rate."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up; below 1 a share of all."})
    num_train_epochs: float = field(default=30.0, metadata={"help": "Passes over the training set."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch size a device."})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the examples in a description line by line."""


class Parser(HfArgumentParser):
    """Raises ValueError where argparse would end the program."""

    def error(self, message: str):
        raise ValueError(f"{message} (--help lists all arguments)")


def word_parser(description: str) -> Parser:
    """The parser of a word whose few arguments are no dataclasses."""
    return Parser((), description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def chosen(argument: str) -> str | None:
    """What the command line gives an argument on which the other arguments depend; None when it does not say."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument(argument, nargs="?", dest="value")
    return early.parse_known_args()[0].value


def parse(
    groups: tuple[type, ...],
    description: str,
    adapter_defaults: dict | None = None,
    pushes: bool = False,
    **defaults,
):
    """Parse the command line into dataclasses, with the recipe's own defaults.

    Choosing `--num_train_epochs` switches off a default `max_steps`, which would win over it; choosing an adapter
    brings the defaults of Fast FIP.

    Args:
        pushes: whether the recipe can push what it makes to the Hub.

    Raises:
        ValueError: for an argument that does not exist or has a wrong value.
    """
    usage = "%(prog)s [--config file.yaml] [--argument value ...]"
    parser = Parser(groups, description=description, usage=usage, formatter_class=HelpFormatter, allow_abbrev=False)
    if chosen("--adapter") == "singular":
        defaults |= adapter_defaults or {}
    if any(argument.startswith(("--num_train_epochs", "--num-train-epochs")) for argument in sys.argv[1:]):
        defaults.pop("max_steps", None)
    parser.set_defaults(**defaults)
    *parsed, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}")
    if getattr(parsed[-1], "push_to_hub", False) and not pushes:
        raise ValueError("Only what was purified is pushed to the Hub: leave out --push_to_hub.")
    return parsed


def _number_or_text(text: str) -> int | float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
