"""A small translation corpus that is generated, not downloaded: English sentences of one grammar, in Esperanto.

Order and endings differ between the two, as in real translation: adjectives and objects take endings, the plural shows
in each of them, and the place moves to the front.

    the old dogs often see a small red house in the garden .
    en la ĝardeno la maljunaj hundoj ofte vidas malgrandan ruĝan domon .
"""

from __future__ import annotations

import numpy as np

NOUNS = {
    "dog": "hundo",
    "cat": "kato",
    "house": "domo",
    "bird": "birdo",
    "friend": "amiko",
    "teacher": "instruisto",
    "doctor": "kuracisto",
    "tree": "arbo",
    "book": "libro",
    "horse": "ĉevalo",
    "flower": "floro",
    "table": "tablo",
    "letter": "letero",
    "apple": "pomo",
    "car": "aŭto",
    "boat": "boato",
}
ADJECTIVES = {
    "small": "malgranda",
    "big": "granda",
    "red": "ruĝa",
    "green": "verda",
    "old": "maljuna",
    "young": "juna",
    "beautiful": "bela",
    "white": "blanka",
    "good": "bona",
    "new": "nova",
}
VERBS = {
    "see": "vidas",
    "love": "amas",
    "find": "trovas",
    "carry": "portas",
    "paint": "pentras",
    "buy": "aĉetas",
    "want": "volas",
    "sell": "vendas",
}
ADVERBS = {"often": "ofte", "never": "neniam", "always": "ĉiam", "rarely": "malofte", "now": "nun"}
PLACES = {
    "in the garden": "en la ĝardeno",
    "in the city": "en la urbo",
    "at home": "hejme",
    "by the sea": "ĉe la maro",
    "on the mountain": "sur la monto",
    "under the bridge": "sub la ponto",
}


def sentence_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """So many different sentences with their translations, drawn from `seed`."""
    rng = np.random.default_rng(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        english, esperanto = _sentence(rng)
        pairs.setdefault(english, esperanto)
    return list(pairs.items())


def _sentence(rng: np.random.Generator) -> tuple[str, str]:
    subject, is_plural = _phrase(rng, "", most_adjectives=1)
    object_, _ = _phrase(rng, "n", most_adjectives=2)
    verb = _pick(VERBS, rng)
    adverb = _pick(ADVERBS, rng) if rng.random() < 0.5 else ("", "")
    place = _pick(PLACES, rng) if rng.random() < 0.5 else ("", "")
    third_person = verb[0] if is_plural else ("carries" if verb[0] == "carry" else verb[0] + "s")
    english = (subject[0], adverb[0], third_person, object_[0], place[0], ".")
    esperanto = (place[1], subject[1], adverb[1], verb[1], object_[1], ".")
    return " ".join(filter(None, english)), " ".join(filter(None, esperanto))


def _phrase(rng: np.random.Generator, case: str, most_adjectives: int) -> tuple[tuple[str, str], bool]:
    """A noun with article and adjectives in both languages, and whether it is plural; `case` ends object words."""
    is_plural, is_definite = rng.random() < 0.5, rng.random() < 0.5
    noun = _pick(NOUNS, rng)
    names = list(ADJECTIVES)
    adjectives = [names[i] for i in rng.permutation(len(names))[: rng.integers(most_adjectives + 1)]]
    ending = ("j" if is_plural else "") + case
    english = [*adjectives, noun[0] + "s" * is_plural]
    if is_definite:
        english = ["the", *english]
    elif not is_plural:
        english = ["an" if english[0][0] in "aeiou" else "a", *english]
    esperanto = ["la"] * is_definite + [ADJECTIVES[name] + ending for name in adjectives] + [noun[1] + ending]
    return (" ".join(english), " ".join(esperanto)), is_plural


def _pick(words: dict[str, str], rng: np.random.Generator) -> tuple[str, str]:
    english = list(words)[rng.integers(len(words))]
    return english, words[english]
