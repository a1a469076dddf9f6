"""The served network, as inference tasks call it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from fastapi import HTTPException
from monai.data import MetaTensor
from torch import Tensor

from deformux.data.loading import MissingSequence, filled_voxels, missing_sequences
from deformux.data.volume_reader import InvalidVolume
from deformux.inference.captured_network import BatchedNetwork
from deformux.inference.sliding_window import WindowInferer
from deformux.networks.model_file import InvalidModel
from deformux.networks.precision import mixed_precision
from deformux_label.lib.infers.cancellation import raise_if_client_gone
from deformux_label.lib.infers.gpu_memory import Placement
from deformux_label.lib.infers.model_loader import ServedModels

__all__ = ["UNTRAINED", "ServedNetwork", "as_http_errors", "joined_warnings", "served_logits"]

# Less is not freed: reallocation would cost a click more than other processes gain.
_FEW_BYTES = 256 * 2**20

UNTRAINED = "There is no trained model yet: submit a label and train, or start from a pretrained model."


class ServedNetwork:
    """A model version on the device of a placement; takes patches from any device, and stops when the client leaves.

    It looks up the weights at each call, because an object that outlives a request, such as an editor, must not keep
    weights of versions that are no longer served.
    """

    def __init__(self, models: ServedModels, version: str, placement: Placement) -> None:
        self.models = models
        self.version = version
        self.placement = placement
        self.seconds = 0.0

    @torch.inference_mode()
    def __call__(self, patch: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Return logits ``(N, C, D, H, W)``, float32, on the volume's device; add the time to ``seconds``."""
        raise_if_client_gone()
        device = self.placement.device
        network = self.models.network(self.version, device)
        start = time.perf_counter()
        with mixed_precision(device):
            logits = network(patch.to(device), None if guidance is None else guidance.to(device))
        logits = logits.float().to(self.placement.volume_device)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self.seconds += time.perf_counter() - start
        return logits

    def batch_size(self, window: Sequence[int]) -> int:
        """Return the number of windows of this size to pass at once."""
        network = self.models.network(self.version, self.placement.device)
        return network.batch_size(window) if isinstance(network, BatchedNetwork) else 1

    def give_back_memory(self) -> None:
        """Free GPU memory that the network and torch keep, so that a training process can use it."""
        device = self.placement.device
        if not device.startswith("cuda"):
            return
        self.models.give_back_memory(device)
        if torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) > _FEW_BYTES:
            torch.cuda.empty_cache()


@torch.inference_mode()
def served_logits(network: ServedNetwork, image: MetaTensor) -> Tensor:
    """Return logits ``(C, x, y, z)`` of a preprocessed image ``(channels, x, y, z)``."""
    placement = network.placement
    try:
        return WindowInferer(placement.window)(image[None].to(placement.volume_device), network)[0]
    finally:
        network.give_back_memory()


def joined_warnings(image: MetaTensor, *warnings: str | None) -> str | None:
    """Join the distinct warnings of a reply, and those about filled voxels and missing sequences of ``image``."""
    notes = (filled_voxels(image, "of this scan"), missing_sequences(image))
    return " ".join(filter(None, dict.fromkeys((*warnings, *(note and f"{note}." for note in notes))))) or None


@contextmanager
def as_http_errors() -> Iterator[None]:
    """Turn errors about the scan, the model or memory into HTTPException with one sentence."""
    try:
        yield
    except MissingSequence as error:
        raise HTTPException(400, str(error)) from error
    except InvalidVolume as error:
        raise HTTPException(422, str(error)) from error
    except InvalidModel as error:
        # The previous version is served from now on.
        raise HTTPException(409, f"{error}; send the request again, and the previous version answers") from error
    except MemoryError as error:
        raise HTTPException(507, str(error)) from error
