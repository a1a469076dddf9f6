"""All routes that the server offers, each with the lowest role that may call it; any other path is 404."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OFFERED", "Offered", "offered"]


@dataclass(frozen=True)
class Offered:
    """A route that the server offers.

    Args:
        methods: HTTP methods; HEAD only where listed.
        path: in FastAPI's notation, with ``{name}`` for one segment.
        role: the lowest of ``roles.ROLES`` that may call it; None if no login is required.
    """

    methods: tuple[str, ...]
    path: str
    role: str | None


# The first match counts.
OFFERED = (
    Offered(("GET",), "/favicon.ico", None),
    Offered(("GET",), "/auth/", None),
    Offered(("POST",), "/auth/token", None),
    Offered(("GET",), "/auth/token/valid", None),
    Offered(("GET", "POST"), "/auth/login", None),
    Offered(("POST",), "/auth/logout", None),
    # The API's description, and the state of the project.
    Offered(("GET",), "/", "reader"),
    Offered(("GET",), "/docs", "reader"),
    Offered(("GET",), "/assets/{name}", "reader"),
    Offered(("GET",), "/openapi.json", "reader"),
    Offered(("GET",), "/info/", "reader"),
    Offered(("GET",), "/logs/", "admin"),
    Offered(("GET",), "/logs/gpu", "admin"),
    # Inference. Clicks and scribbles need an annotator.
    Offered(("POST",), "/infer/segmentation", "reader"),
    Offered(("POST",), "/infer/{model}", "annotator"),
    Offered(("PUT",), "/session/", "reader"),
    Offered(("GET", "DELETE"), "/session/{session_id}", "reader"),
    Offered(("GET",), "/batch/infer", "reader"),
    Offered(("DELETE",), "/batch/infer", "admin"),
    Offered(("POST",), "/batch/infer/{model}", "admin"),
    Offered(("GET",), "/deformux/inferences", "reader"),
    Offered(("GET",), "/deformux/sessions", "reader"),
    # Studies and labels.
    Offered(("POST",), "/activelearning/{strategy}", "annotator"),
    Offered(("GET",), "/datastore/", "reader"),
    Offered(("PUT",), "/datastore/", "annotator"),
    Offered(("DELETE",), "/datastore/", "reviewer"),
    Offered(("GET", "HEAD"), "/datastore/image", "reader"),
    Offered(("PUT",), "/datastore/image", "annotator"),
    Offered(("DELETE",), "/datastore/image", "reviewer"),
    Offered(("GET",), "/datastore/image/info", "reader"),
    Offered(("PUT",), "/datastore/image/info", "annotator"),
    Offered(("GET", "HEAD"), "/datastore/label", "reader"),
    Offered(("PUT",), "/datastore/label", "annotator"),
    Offered(("DELETE",), "/datastore/label", "reviewer"),
    Offered(("GET",), "/datastore/label/info", "reader"),
    Offered(("PUT",), "/datastore/label/info", "annotator"),
    Offered(("PUT",), "/datastore/updatelabelinfo", "annotator"),
    Offered(("GET",), "/datastore/dataset", "annotator"),
    Offered(("GET",), "/deformux/labels/revisions", "reader"),
    Offered(("GET",), "/deformux/labels/revision", "reader"),
    Offered(("POST",), "/deformux/labels/restore", "reviewer"),
    Offered(("GET",), "/deformux/leases", "reader"),
    Offered(("DELETE",), "/deformux/leases", "annotator"),
    # Training and models.
    Offered(("GET",), "/train/", "reader"),
    Offered(("POST", "DELETE"), "/train/", "admin"),
    Offered(("POST",), "/train/{model}", "admin"),
    Offered(("GET",), "/scoring/", "reader"),
    Offered(("POST", "DELETE"), "/scoring/", "admin"),
    Offered(("POST",), "/scoring/{method}", "admin"),
    Offered(("GET", "PUT", "DELETE"), "/model/{model}", "admin"),
    Offered(("GET",), "/deformux/versions", "reader"),
    Offered(("POST",), "/deformux/versions/rollback", "admin"),
    Offered(("POST",), "/deformux/versions/unpin", "admin"),
    Offered(("GET",), "/deformux/versions/{name}", "reader"),
    Offered(("POST",), "/deformux/versions/{name}/publish", "admin"),
    Offered(("POST",), "/deformux/versions/{name}/pin", "admin"),
)


def offered(method: str, path: str) -> Offered | None:
    """Return the route of a request, or None if the server does not offer it."""
    for route in OFFERED:
        if method in route.methods and _matches(route.path, path):
            return route
    return None


def _matches(template: str, path: str) -> bool:
    parts, wanted = path.split("/"), template.split("/")
    return len(parts) == len(wanted) and all(
        want == part or (want.startswith("{") and part != "") for want, part in zip(wanted, parts, strict=True)
    )
