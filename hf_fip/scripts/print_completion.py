"""Print what makes a shell complete the words and arguments of hf-fip.

hf-fip completion bash >> ~/.bashrc
hf-fip completion zsh >> ~/.zshrc
"""

from __future__ import annotations

import importlib
import io
import re
import sys
from contextlib import redirect_stdout, suppress

from .arguments import word_parser
from .tasks import DEFAULT, TASKS

_SCRIPT = """\
_hf_fip() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} choices=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        choices="{words}"
    else
        case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$choices" -- "$current"))
    case $current in -*) ;; *) COMPREPLY+=($(compgen -f -- "$current")) ;; esac
}}
complete -o filenames -F _hf_fip hf-fip
"""


def main() -> None:
    """`hf-fip completion`."""
    parser = word_parser(__doc__)
    parser.add_argument("shell", choices=("bash", "zsh"))
    shell = parser.parse_args().shell
    from ..cli import COMMANDS

    cases = []
    for word, (module, _) in COMMANDS.items():
        if "{task}" in module:
            names = [name for name in TASKS if name != DEFAULT]
            cases += [(f'"{word} {name}"', _options(module.format(task=name))) for name in names]
            cases.append((f'"{word} "*', " ".join([*TASKS, _options(module.format(task=DEFAULT))])))
        else:
            cases.append((f'"{word} "*', _options(module)))
    if shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    lines = "\n".join(f'            {pattern}) choices="{options}" ;;' for pattern, options in cases)
    print(_SCRIPT.format(words=" ".join(COMMANDS), cases=lines), end="")


def _options(module: str) -> str:
    """The options that a script's --help names."""
    said, found = io.StringIO(), sys.argv
    sys.argv = [module, "--help"]
    try:
        with redirect_stdout(said), suppress(SystemExit):
            importlib.import_module(f".{module}", __package__).main()
    finally:
        sys.argv = found
    return " ".join(sorted(set(re.findall(r"(?<![\w-])--[a-z]\w+", said.getvalue()))))
