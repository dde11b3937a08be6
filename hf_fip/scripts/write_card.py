"""Write the card of a purified model or adapter again, from the report and the plots in its folder.

hf-fip card outputs/fip
hf-fip card outputs/fip --to model_cards/digits_vit_fip      (card, report and plots, without the model)
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..hub.card import CARD_NAME, HERE, REPORT_NAME, card_of
from .arguments import word_parser
from .terminal import say


def main() -> None:
    """`hf-fip card`."""
    parser = word_parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", type=Path, help="what a purification left")
    parser.add_argument(
        "--to", type=Path, metavar="PLACE", help="write there, with report and plots, and not in FOLDER"
    )
    parser.add_argument("--place", default=HERE, help="Hub id that the card's code loads from; default: this folder")
    parser.add_argument("--print", action="store_true", help="print the card in place of writing it")
    arguments = parser.parse_args()
    if arguments.to and len(arguments.folders) > 1:
        raise ValueError("--to takes the card of one folder.")
    for folder in arguments.folders:
        place = arguments.to or folder
        card = card_of(folder, arguments.place, name=place.resolve().name if arguments.place == HERE else None)
        if arguments.print:
            say(str(card))
            continue
        if arguments.to:
            shutil.copytree(folder / "plots", place / "plots", dirs_exist_ok=True)
            shutil.copyfile(folder / REPORT_NAME, place / REPORT_NAME)
        card.save(place / CARD_NAME)
        say(f"written: {place / CARD_NAME}")
