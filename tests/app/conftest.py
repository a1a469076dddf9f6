"""The fixtures of this folder, which ``tests/security`` takes from the same place."""

from shared_fixtures import *  # noqa: F403
