"""Patches drawn by several processes are those drawn by one."""

from __future__ import annotations

import random

import numpy as np
import torch

from deformux.data.preprocessing import Preprocessing
from deformux.fitting.patches import Patches
from deformux.fitting.recipe import RECIPES

PREP = Preprocessing("ct", patch_size=(32, 32, 16))
RECIPE = RECIPES["finetune"].replace(steps=7, batch_size=4, patches_per_volume=2, elastic_probability=0.5)


def drawn(cases, *, workers: int, first_step: int = 0, **options) -> list[dict[str, torch.Tensor]]:
    patches = Patches(
        cases, new=("case1",), recipe=RECIPE.replace(**options), prep=PREP, labels=("ball", "box"), workers=workers
    )
    return list(patches.loader(first_step=first_step, steps=RECIPE.steps, seed=5))


def same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> bool:
    """Use one thread, as worker processes do: resampling rounds differently with more."""
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.allclose(a[key].float(), b[key].float(), rtol=0, atol=1e-5) for key in a)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_several_processes_draw_the_same_as_one(write_case) -> None:
    cases = [write_case(f"case{i}", seed=i) for i in range(3)]
    alone = drawn(cases, workers=0)
    assert [tuple(batch["image"].shape) for batch in alone] == [(4, 1, 32, 32, 16)] * RECIPE.steps
    assert same(drawn(cases, workers=2), alone)
    assert same(drawn(cases, workers=2, cache_gb=0.0), alone), "volumes that are read again each time"
    assert same(drawn(cases, workers=2, first_step=3), alone[3:]), "what a resumed training draws"
    assert not torch.equal(alone[0]["image"], alone[1]["image"])


def test_other_random_draws_do_not_matter(write_case) -> None:
    cases = [write_case("case1", seed=1)]
    patches = Patches(cases, new=(), recipe=RECIPE, prep=PREP, labels=("ball", "box"), workers=0)
    batches = []
    for batch in patches.loader(first_step=0, steps=RECIPE.steps, seed=5):
        batches.append(batch)
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002 - as a library would
    assert same(batches, list(patches.loader(first_step=0, steps=RECIPE.steps, seed=5)))
