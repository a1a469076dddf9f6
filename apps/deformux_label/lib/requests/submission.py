"""A submitted label, typed."""

from __future__ import annotations

from typing import Any

from monailabel.interfaces.datastore import DefaultLabelTag
from pydantic import BaseModel, ConfigDict

from deformux_label.lib.requests.json_text import json_object
from deformux_label.lib.requests.options import with_checked_client

__all__ = ["FINAL_TAG", "MAX_INFO_BYTES", "Submission"]

FINAL_TAG = DefaultLabelTag.FINAL.value
# A limit, because this information is sent with every listing.
MAX_INFO_BYTES = 100_000


class Submission(BaseModel):
    """A label that a client saves.

    Args:
        image: id of its volume.
        tag: ``final`` by default.
        info: the client's information about it, stored with unknown fields.
    """

    model_config = ConfigDict(frozen=True)

    image: str
    tag: str
    info: dict[str, Any]

    @classmethod
    def of(cls, image: str, tag: str, params: str) -> Submission:
        """Parse the parts of a request; raise HTTPException for bad ones."""
        info = with_checked_client(json_object(params, most=MAX_INFO_BYTES))
        return cls(image=image, tag=tag or FINAL_TAG, info=info)
