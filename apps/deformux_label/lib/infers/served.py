"""The published network as the tasks of a request call it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from fastapi import HTTPException
from monai.data import MetaTensor
from torch import Tensor

from deformux.inference import WindowInferer, mixed_precision
from deformux.transforms import InvalidVolume, filled_voxels
from deformux.weights import InvalidModel
from deformux_label.offloop import raise_if_client_gone

from ..models import ServedModels
from .memory import Attempt

__all__ = ["UNTRAINED", "ServedNetwork", "give_back_memory", "in_a_sentence", "sentences", "volume_logits"]

UNTRAINED = "There is no trained model yet: submit a label and train, or start from a pretrained model."


class ServedNetwork:
    """A version on the device of an attempt, for patches from anywhere; ends with the client that waits for it.

    It looks the weights up at each call: what outlives a request, such as an editor, must not keep those of versions
    that are served no more.
    """

    def __init__(self, models: ServedModels, version: str, attempt: Attempt) -> None:
        self.models = models
        self.version = version
        self.attempt = attempt
        self.seconds = 0.0

    @torch.inference_mode()
    def __call__(self, patch: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Logits ``(N, C, D, H, W)``, float32, where the attempt keeps the volume; adds its time to ``seconds``."""
        raise_if_client_gone()
        network, _ = self.models.load(self.version, self.attempt.device)
        start = time.perf_counter()
        device = self.attempt.device
        with mixed_precision(device):
            logits = network(patch.to(device), None if guidance is None else guidance.to(device))
        logits = logits.float().to(self.attempt.volume_device)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self.seconds += time.perf_counter() - start
        return logits


@torch.inference_mode()
def volume_logits(network: ServedNetwork, image: MetaTensor) -> Tensor:
    """Logits ``(C, x, y, z)`` of a preprocessed image ``(1, x, y, z)``."""
    attempt = network.attempt
    try:
        return WindowInferer(attempt.window)(image[None].to(attempt.volume_device), network)[0]
    finally:
        give_back_memory(attempt.device)


def give_back_memory(device: str) -> None:
    """Free what torch keeps of a GPU's memory for the next request: a training in its own process cannot use it."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def sentences(image: MetaTensor, *warnings: str | None) -> str | None:
    """What a reply must warn of, each once: the warnings that there are, and what the scan ``image`` itself lacks."""
    filled = filled_voxels(image, "of this scan")
    return " ".join(filter(None, dict.fromkeys((*warnings, filled and f"{filled}.")))) or None


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """Answer what a request cannot have with one sentence."""
    try:
        yield
    except InvalidVolume as error:
        raise HTTPException(422, str(error)) from error
    except InvalidModel as error:
        # From now on the version before it answers.
        raise HTTPException(409, f"{error}; send the request again, and the version before it answers") from error
    except MemoryError as error:
        raise HTTPException(507, str(error)) from error
