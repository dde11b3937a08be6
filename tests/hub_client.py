"""The client's side of the tests of the Hub, run as a program of its own: HF_ENDPOINT is read at the first import.

It takes steps as lines of JSON, `[function, arguments, options]`, and answers each with a line: what it gave, or why
it refused.
"""

from __future__ import annotations

import json
import os
import sys
import time

from hf_fip.hub import push
from hf_fip.tasks.data import load_splits

time.sleep = lambda seconds: None  # the retries of this client and of huggingface_hub's do not wait
STEPS = {
    "push": push.push_folder,
    "pull": lambda *arguments, **options: str(push.pull(*arguments, **options)),
    "load data": lambda *arguments, **options: load_splits(*arguments, **options).num_rows,
    "use the token": lambda token: os.environ.update(HF_TOKEN=token),
}


def main() -> None:
    """Run the steps; a refusal is `{"error": …}`, and any other exception ends the program."""
    for line in sys.stdin:
        name, arguments, options = json.loads(line)
        try:
            answer = STEPS[name](*arguments, **options)
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
