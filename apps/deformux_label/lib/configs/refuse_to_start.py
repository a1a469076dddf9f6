"""Ending a start that cannot work."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

__all__ = ["refuse_to_start"]


def refuse_to_start(reason: str) -> NoReturn:
    """Say why in one sentence and end the process with exit code 2.

    The app is built inside the web server's start, where any exception, SystemExit included, is reported with the
    stack trace of five frameworks and the sentence is lost in it.
    """
    logging.shutdown()
    sys.stdout.flush()
    print(f"deformux-label: {reason}.", file=sys.stderr, flush=True)
    os._exit(2)
