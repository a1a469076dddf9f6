"""A clean end for a start that cannot succeed."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

__all__ = ["refuse_to_start"]


def refuse_to_start(reason: str) -> NoReturn:
    """Print one sentence and end the process with exit code 2.

    The web server creates the app during its start, and reports any exception, even SystemExit, with a long stack trace
    in which the sentence would be lost.
    """
    logging.shutdown()
    sys.stdout.flush()
    print(f"deformux-label: {reason}.", file=sys.stderr, flush=True)
    os._exit(2)
