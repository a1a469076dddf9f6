"""The servers, volumes and clients of ``tests/app``, for attacks on them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "app"))

from shared_fixtures import *  # noqa: F403
