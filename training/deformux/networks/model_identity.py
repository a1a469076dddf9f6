"""Identity of a model: what its results depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from deformux.networks.model_file import InvalidModel, read_card

__all__ = ["model_identity"]

# Keys of a card that describe a model's origin. Any other key may change its results.
_DESCRIPTION = {
    *("parent", "training_cases", "training_labels", "recipe", "seed", "validation", "gate", "provisional"),
    *("scratch_cases", "run", "seconds", "created", "device", "notes", "plan", "weights_sha256"),
}


def model_identity(path: Path) -> str:
    """Return a checksum, in hexadecimal, of a model file's weights and of what its card says about using them.

    The card is taken as it is written, so that a later version of this program, which may add keys with defaults,
    finds the same identity.

    Raises:
        InvalidModel: a file is missing or cannot be read.
    """
    read_card(path)
    card = json.loads(path.with_suffix(".json").read_text())
    used = {key: value for key, value in card.items() if key not in _DESCRIPTION}
    digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode())
    try:
        digest.update(path.read_bytes())
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read") from error
    return digest.hexdigest()
