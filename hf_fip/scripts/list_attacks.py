"""List the attacks: what each does, which labels it gives, and its options with their defaults.

hf-fip attacks
hf-fip attacks wanet
"""

from __future__ import annotations

import inspect
from dataclasses import fields

from ..attacks import BaseAttack, attack_class, attack_names, input_kinds
from .arguments import word_parser
from .terminal import print_whole


def main() -> None:
    """`hf-fip attacks`."""
    parser = word_parser(__doc__)
    parser.add_argument("name", nargs="?", help="tell all about this one")
    name = parser.parse_args().name
    if name is None:
        _print_table()
    else:
        _print_attack(name)


def _print_table() -> None:
    from rich.table import Table

    for kind in input_kinds():
        table = Table(title=f"Input: {kind.replace('_', ' ')}", title_justify="left")
        for heading in ("attack", "labels", "rate", "learned", ""):
            table.add_column(heading, no_wrap=bool(heading))
        for name in attack_names(kind):
            cls = attack_class(name)
            what = inspect.getmodule(cls).__doc__.split("\n")[0]
            rate = "" if cls.default_rate is None else f"{cls.default_rate:g}"
            table.add_row(name, _labels(cls), rate, _learns(cls), what)
        print_whole(table)
    print("Options of each: hf-fip attacks NAME. Train a victim: hf-fip backdoor TASK --attack NAME (hf-fip tasks).")


def _print_attack(name: str) -> None:
    cls = attack_class(name)
    print(f"{name}: {inspect.getdoc(cls)}\n")
    print("Options and their defaults, for --attack_options name=value,name=value:")
    for field in fields(cls):
        print(f"  {field.name}={field.default}")


def _labels(cls: type) -> str:
    """What becomes of the labels, where there are any."""
    if getattr(cls, "clean_label", False):
        return "kept"
    return getattr(cls, "label_rule", "").replace("_", "-")


def _learns(cls: type) -> str:
    """What has to be trained beside the victim."""
    if getattr(cls, "triggers_in_training", False):
        return "with the victim"
    return "" if cls.fit is BaseAttack.fit else "first"
