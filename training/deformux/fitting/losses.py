"""Training loss for labels that may be incomplete."""

from __future__ import annotations

import torch
from monai.losses import DiceLoss
from monai.networks.utils import one_hot
from torch import Tensor, nn

from deformux.data.label_values import UNLABELLED

__all__ = ["PartialDiceCELoss"]


class PartialDiceCELoss(nn.Module):
    """Dice plus cross entropy over what was annotated; with complete labels it equals MONAI's ``DiceCELoss``.

    Voxels of value ``UNLABELLED`` count nowhere. In a volume that was annotated for some of the labels only, background
    means "none of these": the probabilities of the other labels are added to the background's before both terms (the
    marginal loss of Shi et al., Medical Image Analysis 70, 2021, arXiv 2007.03868, section 3.1; also the target
    adaptive loss of Fang and Yan, IEEE TMI 39, 2020). Moving probability between background and a label that was not
    annotated therefore changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dice = DiceLoss(include_background=False, batch=True)

    def forward(
        self, logits: Tensor, label: Tensor, annotated: Tensor | None = None, emphasis: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a scalar; 0 if nothing is labelled. It never waits for a GPU: a graph can capture it.

        Args:
            logits: ``(N, C, D, H, W)``, class 0 is background.
            label: ``(N, 1, D, H, W)`` with values 0..C-1 and ``UNLABELLED``.
            annotated: ``(N, C)``, whether a class was annotated in a volume; class 0 always counts as annotated. None
                means that all were, which spares the sums over the others.
            emphasis: weights ``(N, 1, D, H, W)`` of a second cross entropy, whose weighted mean is added.
        """
        target = label.long()
        known = target != UNLABELLED
        log_probabilities, mask = logits.log_softmax(1), known
        if annotated is not None:
            classes = annotated.to(logits.device, torch.bool).clone()
            classes[:, 0] = True
            log_probabilities = _marginal(log_probabilities, classes)
            mask = known & classes[:, :, None, None, None]
        chosen = torch.where(known, target, 0)
        truth = one_hot(chosen, logits.shape[1])
        # Like gather(1, chosen), whose gradient makes a GPU wait where algorithms must be deterministic.
        nll = torch.where(known, -(truth * log_probabilities).sum(1, keepdim=True), 0.0)
        cross_entropy = nll.sum() / known.sum().clamp(min=1)
        if emphasis is not None:
            cross_entropy = cross_entropy + (emphasis * nll).sum() / (emphasis * known).sum().clamp(min=1)
        return self.dice(torch.where(mask, log_probabilities.exp(), 0.0), truth * mask) + cross_entropy


def _marginal(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    """Return log probabilities in which the classes that are not in ``classes`` (N, C) are merged into class 0."""
    here = classes[:, :, None, None, None]
    merged = here.clone()
    merged[:, 0] = False
    # Class 0 and the classes that were not annotated, summed as logarithms so that nothing underflows.
    background = torch.logsumexp(log_probabilities.masked_fill(merged, -torch.inf), 1, keepdim=True)
    # The merged classes keep a finite value, whose gradient is never used.
    rest = log_probabilities[:, 1:].masked_fill(~here[:, 1:], -100.0)
    return torch.cat([background, rest], 1)
