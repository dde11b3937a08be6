"""The table of tasks in recipes/README.md is what the tasks say of themselves."""

import re
from pathlib import Path

from hf_fip.attacks import attack_names, input_kinds
from hf_fip.scripts.task_table import table

RECIPES = Path(__file__).parents[1] / "recipes"


def test_the_page_is_up_to_date():
    made = table()
    assert (RECIPES / "README.md").read_text() == made, "run python -m hf_fip.scripts.task_table > recipes/README.md"


def test_it_names_every_recipe_and_every_attack_and_no_other():
    made = table()
    assert set(re.findall(r"`(\w+\.py)`", made)) == {path.name for path in RECIPES.glob("*.py")}
    for kind in input_kinds():
        assert all(f"`{name}`" in made for name in attack_names(kind))
