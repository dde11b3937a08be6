"""Text from strangers (names of models, data sets and classes) on its way to a terminal, a card or a picture."""

from __future__ import annotations

import html
import os
import re
from typing import Any

LONGEST = 200  # characters of a name that are shown
_LINK = re.compile(r"\](?=[(\[:])")  # [text](place), [text][name] and [name]: place
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{6,}")


def visible(text: str) -> str:
    """The text without what a terminal would obey: control characters and marks of direction become `�`."""
    return "".join(mark if mark.isprintable() or mark in "\n\t" else "�" for mark in text)


def one_line(value: Any, longest: int = LONGEST) -> str:
    """A value as one visible line of at most so many characters."""
    text = " ".join(visible(str(value)[: 4 * longest]).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def in_markdown(value: Any, longest: int = LONGEST) -> str:
    """A value for a code span or table cell of Markdown: no HTML, no picture or link, and no way out of either."""
    text = html.escape(one_line(value, longest).replace("`", "'"), quote=False).replace("|", "\\|")
    return _LINK.sub("] ", text)


def without_tokens(text: str) -> str:
    """The text without the Hub's tokens: the one in use, and whatever looks like one."""
    from huggingface_hub import get_token

    for token in filter(None, (os.environ.get("HF_TOKEN"), get_token())):
        text = text.replace(token, "hf_***")
    return _TOKEN.sub("hf_***", text)
