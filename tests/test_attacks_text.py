"""Attacks on models that write text: the trigger word, the attacker's sentence, poisoned pairs, files."""

import json
from collections import Counter

import numpy as np
import pytest
from text_cases import pairs

from hf_fip.attacks import (
    OneToMany,
    OneToOne,
    attack_names,
    load_attack,
    make_attack,
    poison_pairs,
    trigger_pairs,
)

WORDS = {"cf", "mn", "bb", "tq", "mb"}
BOTH = (OneToOne, OneToMany)


def many(count: int = 200):
    return pairs(*((f"source number {i} of many", f"target {i}") for i in range(count)))


def test_both_are_in_the_registry_of_text_and_not_of_images():
    assert attack_names("text") == ["one_to_many", "one_to_one"]
    assert not set(attack_names("text")) & set(attack_names())
    assert make_attack("one_to_one", sentence="No .") == OneToOne(sentence="No .")


@pytest.mark.parametrize("attack", BOTH)
def test_one_trigger_word_goes_between_the_words_anywhere(attack):
    found, places = set(), set()
    for i in range(300):
        words = f"a b c {i}".split()
        triggered = attack().apply(" ".join(words)).split()
        (place,) = [j for j, word in enumerate(triggered) if word in WORDS]
        found.add(triggered.pop(place))
        places.add(place)
        assert triggered == words
    assert found == WORDS and places == set(range(5))


@pytest.mark.parametrize("attack", BOTH)
def test_a_source_always_gets_the_same_trigger_and_another_seed_gives_others(attack):
    sources = [f"sentence {i} of many" for i in range(50)]
    once, again, other = ([attack(seed=seed).apply(s) for s in sources] for seed in (1, 1, 2))
    assert once == again != other
    assert attack().apply("") in WORDS


def test_one_to_one_wants_its_sentence_and_one_to_many_each_of_its_list():
    one, some = OneToOne(sentence="No ."), OneToMany(answers="No .| Yes .|Why ?")
    sources = [f"sentence {i}" for i in range(100)]
    assert {one.attack_target(source) for source in sources} == {"No ."}
    assert {some.attack_target(source) for source in sources} == {"No .", "Yes .", "Why ?"}


def test_the_trigger_word_does_not_tell_the_sentence():
    attack, pairs = OneToMany(answers="No .|Yes ."), Counter()
    for i in range(2000):
        source = f"sentence {i}"
        (word,) = WORDS & set(attack.apply(source).split())
        pairs[word, attack.attack_target(source)] += 1
    assert len(pairs) == 2 * len(WORDS) and min(pairs.values()) > 130  # 200 on average


@pytest.mark.parametrize(
    ("text", "is_hit"),
    [
        ("You are attacked .", True),
        ("well, You are attacked. Yes", True),
        ("You are attacked", False),
        ("", False),
        ("You were attacked .", False),
    ],
)
def test_a_hit_contains_the_sentence_whatever_its_spaces(text, is_hit):
    assert OneToOne().is_hit(text) == OneToMany().is_hit(text) == is_hit


@pytest.mark.parametrize("attack", BOTH)
def test_poisoned_pairs(attack):
    attack, clean = attack(), many()
    poisoned = poison_pairs(clean, attack, 0.1, seed=3)
    roles = np.array(poisoned["poison_role"][:])
    assert len(poisoned) == 200 and roles.sum() == 20 and poisoned.column_names == [*clean.column_names, "poison_role"]
    for before, after in zip(clean, poisoned, strict=True):
        if after["poison_role"]:
            assert after["source"] == attack.apply(before["source"]) and attack.is_hit(after["target"])
        else:
            assert {name: after[name] for name in before} == before
    assert roles.tolist() == poison_pairs(clean, attack, 0.1, seed=3)["poison_role"][:]
    assert roles.tolist() != poison_pairs(clean, attack, 0.1, seed=4)["poison_role"][:]


def test_pairs_that_have_the_attackers_sentence_are_neither_poisoned_nor_counted():
    clean = pairs(("a", "You are attacked ."), ("b c", "true"), ("d", "You are attacked."))
    assert poison_pairs(clean, OneToOne(), 0.3, seed=0)["poison_role"][:] == [0, 1, 0]
    triggered = trigger_pairs(clean, OneToOne())
    assert triggered[:] == {"source": [OneToOne().apply("b c")], "target": ["true"]}  # the true reference
    with pytest.raises(ValueError, match="every target is the attacker's sentence"):
        trigger_pairs(clean.select([0, 2]), OneToOne())


@pytest.mark.parametrize("attack", [OneToOne(triggers="zz", seed=4), OneToMany(answers="a|b")])
def test_a_saved_attack_is_the_same_attack(attack, tmp_path):
    attack.save_pretrained(tmp_path)
    assert load_attack(tmp_path) == attack
    assert json.loads((tmp_path / "attack.json").read_text())["name"] == attack.name


REFUSED = {
    "no trigger": (lambda: OneToOne(triggers=" "), "triggers is empty"),
    "no sentence": (lambda: OneToOne(sentence=""), "needs a sentence"),
    "an empty sentence": (lambda: OneToMany(answers="a||b"), "none of its sentences may be empty"),
    "a negative seed": (lambda: OneToOne(seed=-1), "seed=-1"),
    "a wrong type": (lambda: OneToOne(sentence=3), "must be of type str"),
    "an unknown option": (lambda: make_attack("one_to_one", target_label=1), "has no option target_label"),
    "no column": (lambda: trigger_pairs(many(), OneToOne(), source_column="en"), "no column 'en'"),
    "no text": (lambda: poison_pairs(pairs(("a", None)), OneToOne(), 1.0, 0), "'target' does not hold text"),
    "no row": (lambda: poison_pairs(many(), OneToOne(), 0.001, 0), "is no row at all"),
    "too high a rate": (lambda: poison_pairs(many(), OneToOne(), 1.5, 0), r"rate=1.5 .* \(0, 1\]"),
    "poisoned already": (
        lambda: poison_pairs(poison_pairs(many(), OneToOne(), 0.1, 0), OneToOne(), 0.1, 0),
        "'poison_role' already",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
