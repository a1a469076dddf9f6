"""Volumes to cut patches from: in memory while they fit, else in files that are mapped into memory."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Transform
from monai.transforms.utils import map_binary_to_indices

from deformux.data.preprocessed_store import PreprocessedStore, store_key

__all__ = ["BACKGROUND_INDICES", "FOREGROUND_INDICES", "Volumes"]

# Keys under which the crop of patches finds the voxels that may be centres.
FOREGROUND_INDICES, BACKGROUND_INDICES = "foreground_indices", "background_indices"
# Of a volume with more voxels a sample of as many centres is kept.
_ALL_CENTRES = 2**24
_SAMPLE = 2**20


class Volumes(CacheDataset):
    """MONAI's cached volumes, where those beyond the cache come from a store on disk.

    Patches are the same wherever a volume comes from, except for centres in volumes of more than 2²⁴ voxels: there
    they are drawn from a sample of 2²⁰ of each kind.

    Args:
        files: dictionaries of ``image``, ``label`` and ``annotated``.
        fixed: transforms before the first random one.
        random: the others, from the crop of patches on.
        keep: number of volumes to keep in memory.
        store: for the rest; None to read them again each time.
    """

    def __init__(
        self,
        files: Sequence[Mapping[str, Any]],
        fixed: Sequence[Transform],
        random: Sequence[Transform],
        *,
        keep: int,
        store: PreprocessedStore | None,
    ) -> None:
        super().__init__(files, [*fixed, *random], cache_num=keep, num_workers=1, progress=False)
        self._n_fixed, self._store = len(fixed), store

    def fixed(self, index: int) -> Any:
        """Return a volume as it is before the first random transform."""
        if index < self.cache_num:
            return self._cache[index]
        return self.transform(copy(self.data[index]), end=self._n_fixed)

    def _transform(self, index: int) -> Any:
        if self._store is None or index % len(self) < self.cache_num:
            return super()._transform(index)
        file = self.data[index]
        key = store_key(*(file["image"]), file["label"])
        arrays = self._store.get(key)
        if arrays is None:
            arrays = self._preprocessed(file, key)
            self._store.put(key, arrays)
        return self.transform(_opened(arrays, file["annotated"]), start=self._n_fixed)

    def _preprocessed(self, file: Mapping[str, Any], key: str) -> dict[str, npt.NDArray[Any]]:
        data = self.transform(copy(file), end=self._n_fixed)
        foreground, background = map_binary_to_indices(data["foreground"], data["known"], 0)
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        return {
            "image": np.asarray(data["image"]),
            "label": np.asarray(data["label"]),
            FOREGROUND_INDICES: _sampled(np.asarray(foreground), data["label"].numel(), rng),
            BACKGROUND_INDICES: _sampled(np.asarray(background), data["label"].numel(), rng),
        }


def _sampled(
    centres: npt.NDArray[np.int64], voxels: int, rng: np.random.Generator
) -> npt.NDArray[np.int64] | npt.NDArray[np.uint32]:
    if voxels > _ALL_CENTRES and len(centres) > _SAMPLE:
        centres = np.sort(rng.choice(centres, _SAMPLE, replace=False))
    return centres.astype(np.uint32) if voxels < 2**32 else centres


def _opened(arrays: Mapping[str, npt.NDArray[Any]], annotated: npt.NDArray[np.bool_]) -> dict[Hashable, Any]:
    image, label = (MetaTensor(torch.from_numpy(arrays[name])) for name in ("image", "label"))
    # The crop asks it for its size only.
    size = MetaTensor(torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(1, *label.shape[1:]))
    centres: dict[Hashable, Any] = {name: arrays[name] for name in (FOREGROUND_INDICES, BACKGROUND_INDICES)}
    return {"image": image, "label": label, "annotated": annotated, "foreground": size, **centres}
