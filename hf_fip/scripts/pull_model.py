"""Get a model or adapter from the Hub as a folder: looked at before anything reads it, and whole or not there.

hf-fip pull someone/purified-model
hf-fip pull someone/purified-model --revision v2 --output_dir outputs/theirs
"""

from __future__ import annotations

import json

from ..hub.push import pull
from .arguments import word_parser
from .terminal import say


def main() -> None:
    """`hf-fip pull`."""
    parser = word_parser(__doc__)
    parser.add_argument("repo_id", metavar="REPO", help="id of the repository")
    parser.add_argument("--output_dir", help="where to; default: the name of the repository, here")
    parser.add_argument("--revision", help="branch, tag or commit; default: main")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    folder = pull(
        arguments.repo_id,
        arguments.output_dir or arguments.repo_id.rpartition("/")[2],
        revision=arguments.revision,
    )
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    if arguments.json:
        say(json.dumps({"folder": str(folder), "files": files}))
    else:
        say(f"pulled to {folder}: {', '.join(files)}")
