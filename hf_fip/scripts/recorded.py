"""What the folder of a model made here tells: its victim, the attack, and the clean split that was never seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from safetensors import SafetensorError

from ..attacks import Attack, load_attack
from ..attacks.base import CONFIG_NAME
from ..hub.card import REPORT_NAME
from ..hub.safety import ATTACK_FOLDER, LONGEST_REPORT, NO_TRUST, Trust, admit, check_attack, read_object
from .arguments import AttackArguments, DataArguments

_NOT_WHICH_DATA = ("clean_fraction", "clean_samples", "split_seed")


def attack_of(arguments: AttackArguments, model_folder: str | None, num_labels: int) -> Attack | None:
    """The attack that the arguments name; else the one saved in the model's folder; None when neither is there.

    Raises:
        ValueError: when the folder's attack.json is not a valid attack on such data, or options are given for no
            attack.
    """
    if arguments.attack is not None or model_folder is None:
        return arguments.make(num_labels)
    if arguments.attack_options or arguments.target_label:
        raise ValueError("--attack_options and --target_label describe an attack: name it, with --attack.")
    folder = attack_folder(model_folder)
    if folder is None:
        return None
    try:
        check_attack(folder)
        attack = load_attack(folder)
        if attack.input_kind != arguments.input_kind:
            raise ValueError(f"{attack.name} is an attack on {attack.input_kind} data.")
        if isinstance(attack, Attack):
            attack.attack_label([0], num_labels)  # the target has to be a class of these data
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{model_folder}: attack.json or attack.safetensors is not valid: {error}") from error
    return attack


def attack_folder(model_folder: str) -> Path | None:
    """Where the attack of a victim, or of a purified model, is saved: in its folder, or in `attack` there."""
    places = (Path(model_folder), Path(model_folder) / ATTACK_FOLDER)
    return next((place for place in places if (place / CONFIG_NAME).is_file()), None)


def report_in(folder: str | Path | None) -> dict:
    """What the report in a folder says; nothing, if there is none, or no JSON object, or no folder was named."""
    if not folder:
        return {}
    try:
        return read_object(Path(folder) / REPORT_NAME, LONGEST_REPORT)
    except ValueError:
        return {}


def victim_of(report: dict, otherwise: str | None) -> str | None:
    """The folder of the victim that a model was purified from, if its report names one."""
    victim = report.get("model")
    return victim if isinstance(victim, str) and Path(victim).is_dir() else otherwise


def take_data(data: DataArguments, report: dict) -> bool:
    """Fill in the data that a report's model was made with where the user named nothing; whether they are then the
    same."""
    arguments = report.get("arguments")
    if not isinstance(arguments, dict):
        return False
    default = type(data)()
    names = [one.name for one in dataclasses.fields(data) if one.name not in _NOT_WHICH_DATA]
    for name in names:
        value = arguments.get(name)
        if type(value) in (str, int) and getattr(data, name) == getattr(default, name):
            setattr(data, name, value)
    return all(getattr(data, name) == arguments.get(name, getattr(default, name)) for name in names)


def take_data_of(model: str, revision: str | None, data: DataArguments) -> None:
    """The same for a model that may be on the Hub; its files are looked at first.

    Raises:
        ValueError: there is no such model, or a file of it is refused.
    """
    take_data(data, report_in(admitted(model, revision)))


def admitted(model: str, revision: str | None, trust: Trust = NO_TRUST) -> Path:
    """The folder of a model, as `hf_fip.hub.safety.admit` lets it in.

    Raises:
        ValueError: there is no such model, or a file of it is refused.
    """
    try:
        return admit(model, revision=revision, trust=trust)
    except ValueError as error:
        raise ValueError(f"No model at {model!r}: {error}") from error


def recorded_split(model_folder: str | None) -> dict | None:
    """The clean split that a victim made here was trained without; None when the model's folder tells of none.

    Its `seed` and `samples`, and the `data` (name) and number of training samples, `out_of`, that it was taken from.

    Raises:
        ValueError: when report.json tells of one, in other terms.
    """
    report = report_in(model_folder)
    if "clean_split" not in report:
        return None
    split = report["clean_split"]
    try:
        return {"data": str(split["data"]), **{key: int(split[key]) for key in ("seed", "samples", "out_of")}}
    except (ValueError, KeyError, TypeError) as error:
        path = Path(model_folder or "") / REPORT_NAME
        raise ValueError(f"{path}: clean_split is not that of a victim trained by this version of hf_fip.") from error


def split_behind(model_folder: str | None) -> dict | None:
    """[`recorded_split`] of a model, or of the victim that it was purified from, by one purification or several."""
    passed = set()
    while model_folder not in passed and (split := recorded_split(model_folder)) is None:
        passed.add(model_folder)
        model_folder = victim_of(report_in(model_folder), model_folder)
    return split
