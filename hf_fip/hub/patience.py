"""Trying again what the Hub may do later: a busy or restarting server, a connection that is cut."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_ATTEMPTS = 4
_FIRST_WAIT = 1.0  # seconds; then twice, and four times as long
Result = TypeVar("Result")


def insist(attempt: Callable[[], Result], unanswered: bool) -> Result:
    """What `attempt` gives, tried four times when the Hub answers that it is busy or broken.

    Args:
        unanswered: try again too when there was no answer at all.

    Raises:
        Exception: the last one of `attempt`.
    """
    for number in range(_ATTEMPTS - 1):
        try:
            return attempt()
        except Exception as error:  # of the client, its HTTP library or the network
            status = status_of(error)
            passing = unanswered and not isinstance(error, ValueError) if status is None else status >= 500
            if not (passing or status in (408, 429)):
                raise
        time.sleep(_FIRST_WAIT * 2**number)
    return attempt()


def status_of(error: BaseException | None) -> int | None:
    """The status that the Hub answered with, if it answered."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response.status_code
        error = error.__cause__
    return None
