"""Push a purified model or adapter to the Hub, with its card, in one commit.

The repository is made if there is none. A push that failed changes nothing here and can be repeated; files that
arrived are not sent again. The token is that of `hf auth login`, or HF_TOKEN.

hf-fip push outputs/fip someone/purified-model --private
hf-fip push outputs/fast_fip someone/adapter --base_model someone/received-model
"""

from __future__ import annotations

import json

from ..hub.push import push_folder
from .arguments import word_parser
from .terminal import say


def main() -> None:
    """`hf-fip push`."""
    parser = word_parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="what a purification left")
    parser.add_argument("repo_id", metavar="REPO", help="id of the repository, name or owner/name")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch, made if there is none; default: main")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request in place of a commit")
    parser.add_argument("--message", default="Purified by hf_fip", help="of the commit")
    parser.add_argument("--base_model", help="Hub id of the received model, for an adapter on one that came from disk")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = vars(parser.parse_args())
    as_json = arguments.pop("json")
    address = push_folder(arguments.pop("folder"), arguments.pop("repo_id"), **arguments)
    say(json.dumps({"url": address}) if as_json else f"pushed: {address}")
