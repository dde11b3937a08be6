"""Attacks: whose label counts, their names and options, and the folder that they are saved to."""

import json
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from attack_cases import SHAPES, assert_loads_as_saved, attack_of, every_attack, image_of

from hf_fip.attacks import BadNets, Blend, WaNet, attack_class, attack_names, input_kinds, load_attack, make_attack
from hf_fip.attacks.base import register

FOURTEEN = ["badnets", "blend", "bppa", "cba", "clb", "dyn_all", "dyn_one", "fba", "issba", "lira", "sig"]
FOURTEEN += ["troj_all", "troj_one", "wanet"]

# Labels


@pytest.mark.parametrize(
    "options, attack_label, eligible",
    [
        ({"target_label": 2}, [2, 2, 2, 2], [True, True, False, True]),
        ({"label_rule": "all_to_all"}, [1, 2, 3, 0], [True, True, True, True]),
    ],
)
def test_label_rules(options, attack_label, eligible):
    attack, labels = BadNets(**options), np.arange(4, dtype=np.int8)
    np.testing.assert_array_equal(attack.attack_label(labels, 4), attack_label)
    np.testing.assert_array_equal(attack.eligible(labels, 4), eligible)
    np.testing.assert_array_equal(attack.candidates(labels, 4), eligible)


# Registry and options


def test_every_name_makes_its_attack():
    assert attack_names() == FOURTEEN
    assert [type(make_attack(name)) for name in ("badnets", "blend", "wanet")] == [BadNets, Blend, WaNet]
    for name in FOURTEEN:
        assert make_attack(name).name == name and type(make_attack(name)) is attack_class(name)
    assert make_attack("badnets", alpha=np.float32(0.5), seed=np.int64(3)) == BadNets(alpha=0.5, seed=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -np.float32("inf")], ids=str)
def test_every_option_of_every_attack_has_to_be_finite(value):
    for name in (name for kind in input_kinds() for name in attack_names(kind)):
        for field in fields(attack_class(name)):
            if type(field.default) is float:
                with pytest.raises(ValueError, match=f"{field.name}=.* must be a finite number"):
                    make_attack(name, **{field.name: value})


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("trojan", {}, "'trojan' is not an attack: choose one of badnets, blend, bppa, cba"),
        ("blend", {"patch_size": 3}, "blend has no option patch_size: it has target_label, .*alpha"),
        ("blend", {"name": "wanet"}, "blend has no option name"),
        ("badnets", {"target_label": -1}, "0 or more"),
        ("badnets", {"seed": -1}, "0 or more"),
        ("badnets", {"seed": 1.5}, "seed=1.5 must be of type int"),
        ("badnets", {"alpha": "1"}, "alpha='1' must be of type float"),
        ("badnets", {"label_rule": "all_to_none"}, "not one of all_to_one, all_to_all"),
        ("badnets", {"alpha": 0.0}, "alpha=0.0"),
        ("badnets", {"alpha": 1.1}, "alpha=1.1"),
        ("badnets", {"patch_size": 0}, "patch_size=0"),
        ("blend", {"alpha": float("nan")}, "alpha=nan"),
        ("wanet", {"strength": 0.0}, "strength=0.0"),
        ("wanet", {"grid_size": 0}, "grid_size=0"),
        ("wanet", {"cover_rate": 1.5}, "cover_rate=1.5"),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_attack(name, **options)


def test_two_attacks_cannot_share_a_name():
    class Impostor(BadNets):
        pass

    with pytest.raises(ValueError, match="there is an attack 'badnets' already"):
        register(Impostor)
    assert type(make_attack("badnets")) is BadNets


# Folder


@every_attack
def test_a_saved_attack_loads_to_the_same_options_and_trigger(case, tmp_path):
    assert_loads_as_saved(attack_of(case), tmp_path / "new" / "folder", *map(image_of, SHAPES))


@pytest.mark.parametrize("name", ["blend", "wanet"])
def test_a_loaded_trigger_does_not_depend_on_the_random_generator(name, tmp_path, monkeypatch):
    attack, image = make_attack(name), image_of((32, 32, 3))
    attack.save_pretrained(tmp_path)
    before = attack.apply(image)
    make_tensors = type(attack).make_tensors
    monkeypatch.setattr(
        type(attack), "make_tensors", lambda self, rng: make_tensors(self, np.random.default_rng(self.seed + 1))
    )
    assert (make_attack(name).apply(image) != before).any()
    np.testing.assert_array_equal(load_attack(tmp_path).apply(image), before)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"name": "trojan", "options": {}}, "'trojan' is not an attack"),
        ({"name": ["blend"], "options": {}}, "is not an attack"),
        ({"name": "blend", "options": {"beta": 1}}, "blend has no option beta"),
        ({"name": "blend", "options": {"alpha": 7}}, "alpha=7"),
        ({"name": "blend", "options": {}, "code": "x"}, "must hold exactly"),
        ({"name": "blend", "options": []}, "must hold exactly"),
        ({"name": "blend"}, "must hold exactly"),
        (["blend"], "must hold exactly"),
        ({"name": "wanet", "options": {}}, r"wanet with these options needs \{'field'"),
    ],
)
def test_a_changed_folder_is_refused(config, message, tmp_path):
    Blend().save_pretrained(tmp_path)
    (tmp_path / "attack.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_attack(tmp_path)


# Import


def test_importing_the_attacks_loads_neither_transformers_nor_datasets():
    code = "import sys, hf_fip.attacks; sys.exit(any(name in sys.modules for name in ('transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
