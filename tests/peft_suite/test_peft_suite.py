"""PEFT's own tests, run on the singular-value adapter."""

import math
import re
from pathlib import Path

import peft_upstream
import pytest
from peft_left_out import LEFT_OUT

if not peft_upstream.FOLDER.is_dir():
    pytest.skip("PEFT's own tests are not unpacked: run `make test`.", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's and torch's, nearly two thousand
CLASSES = peft_upstream.load()
globals().update(CLASSES)  # here pytest finds them
README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")


def counts(test) -> tuple[int, int]:
    """How many tests are made of one, and how many of them run."""
    marks = getattr(test, "pytestmark", [])
    if any(mark.name == "skip" for mark in marks):
        return 1, 0
    tables = [mark.args[1] for mark in marks if mark.name == "parametrize"]
    runs = [sum(not getattr(row, "marks", ()) for row in rows) for rows in tables]
    return math.prod(map(len, tables)), math.prod(runs)


def test_the_readme_lists_what_is_left_out_and_why():
    assert dict(re.findall(r"^\| `(Test\S+?::.+?)` \| (.+) \|$", README, re.MULTILINE)) == LEFT_OUT


def test_the_readme_counts_the_tests():
    for name, test_class in CLASSES.items():
        each = [counts(getattr(test_class, test)) for test in peft_upstream.tests_of(test_class)]
        made, run = map(sum, zip(*each, strict=True))
        assert f"| `{name}` | {run} | {made - run} |" in README


def test_what_is_left_out_exists():
    for name in LEFT_OUT:
        test_class, test, case = re.fullmatch(r"(\w+)::(\w+)(?:\[(.+)\])?", name).groups()
        marks = getattr(CLASSES[test_class], test).pytestmark
        rows = [row for mark in marks if mark.name == "parametrize" for row in mark.args[1]]
        assert case is None or case in [getattr(row, "id", None) for row in rows], name
