"""A seeded fuzzer of the whole server: request number n of a seed is always the same.

It reads ``/openapi.json``, adds the hidden routes and those of MONAI Label that were removed, and mixes valid values,
hostile text, wrong types, deep and huge JSON, broken forms, bad archives and tiny volumes whose headers lie. It starts
no trainings, scorings or batch inferences, which take long, but sends requests for them that must be refused.
"""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import requests
from fuzz_values import FITTING, NAMES, OFTEN, OPTIONS, REMOVED, SPOILT, TEXT, TYPES, VALUES

from deformux_label.web.route_roles import OFFERED

__all__ = ["Fuzzer", "Outcome", "Request", "fuzz"]

Volumes = dict[str, bytes]
_TIMEOUT_S = 60
# Each would start a process of half a minute.
_STARTING = ("/train/", "/scoring/", "/batch/infer/")


@dataclass(frozen=True)
class Request:
    """A request as it is sent."""

    method: str
    target: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def __str__(self) -> str:
        return f"{self.method} {self.target[:300]} {self.headers} {self.body[:300]!r}"


@dataclass
class Outcome:
    """The result: counts of each status, and failures."""

    statuses: dict[int, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


class Fuzzer:
    """Makes the requests.

    Args:
        url: of the server.
        seed: of the requests.
        images: ids of images that must stay as they are: they are read, labelled, and never deleted.
        volumes: whole scans by suffix, to send as they are or damaged.
        labels: whole labels on the images' grid, likewise.
        sessions: ids of sessions that exist.
    """

    def __init__(
        self,
        url: str,
        seed: int,
        *,
        images: Sequence[str],
        volumes: Volumes,
        labels: Volumes,
        sessions: Sequence[str],
    ) -> None:
        described = requests.get(f"{url}/openapi.json", timeout=60).json()
        self.seed = seed
        self.images = tuple(images)
        self.volumes = volumes
        self.labels = labels
        self.sessions = tuple(sessions)
        self.routes: list[tuple[str, str, dict[str, Any]]] = [
            (method, route.path, _operation(described, method, route.path))
            for route in OFFERED
            for method in route.methods
        ]
        # Files and clicks reach more code than names do.
        self.routes += [route for route in self.routes if (route[0], route[1]) in OFTEN for _ in range(5)]
        self.routes += [(method, path, {}) for path in REMOVED for method in ("GET", "POST")]

    def request(self, number: int) -> Request:
        """Return request ``number``, which depends on the seed and the number only."""
        rng = random.Random(self.seed * 10**9 + number)
        method, path, operation = rng.choice(self.routes)
        starting = method == "POST" and path.startswith(_STARTING)
        target = self._path(rng, path)
        query = [(name, self._named(rng, name)) for name in _query_names(operation) if rng.random() < 0.85]
        if rng.random() < 0.2:
            query.append((rng.choice((*OPTIONS, "output", "x", "run_sync")), self._text(rng)))
        if rng.random() < 0.05:
            method = rng.choice(("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"))
            starting = False
        # For these only requests that are refused.
        query = [(name, value) for name, value in query if not (method == "DELETE" and value in self.images)]
        if query:
            target += "?" + "&".join(f"{_quoted(name)}={_quoted(value)}" for name, value in query)
        headers, body = self._body(rng, method, path, starting)
        if rng.random() < 0.05:
            headers[rng.choice(("Origin", "Host", "Sec-Fetch-Site", "Range", "Expect", "If-None-Match"))] = rng.choice(
                ("null", "x", "http://evil.example", "bytes=0-0,5-1,-1", "cross-site", "localhost", "*")
            )
        return Request(method, target[:20_000], headers, body)

    def _path(self, rng: random.Random, path: str) -> str:
        parts = []
        for part in path.split("/"):
            if not part.startswith("{"):
                parts.append(part)
            elif rng.random() < 0.85:
                parts.append(_quoted(self._named(rng, part.strip("{}"))))
            else:
                parts.append(_quoted(self._text(rng)))
        made = "/".join(parts)
        if rng.random() < 0.04:
            made += rng.choice(("/", "/..", "%00", "%ff", "//", ";x", "?", "#", "/%2e%2e"))
        return made

    def _named(self, rng: random.Random, name: str) -> str:
        """Return a value for a parameter, mostly one that fits its name."""
        if rng.random() < 0.15:
            return self._text(rng)
        mine = [f"fuzz_{number}" for number in range(4)]
        ids = [*self.images, *mine]
        fitting: dict[str, Sequence[str]] = {
            "image": ids,
            "id": mine,
            "label": [*self.images, *mine],
            "tag": ("final", "original", "draft", "uncertainty", "a-b"),
            "session_id": (*self.sessions, "00000000-0000-0000-0000-000000000000"),
            "model": ("segmentation", "edit", "histogram+graphcut", "gmm+graphcut", "network+graphcut", "nobody"),
            "strategy": ("random", "first", "adaptive", "uncertainty", "nobody"),
            "method": ("dice", "uncertainty", "nobody"),
            "name": ("v0001", "v0002", "v99999", "rollback"),
            "revision": ("1", "2", "0", "99"),
            "output": ("image", "json", "all", "dicom_seg", "train", "stats"),
            "lines": ("1", "300", "0", "100000"),
            "limit_cases": ("1", "2", "0"),
            "expiry": ("0", "60", "-1"),
            "check_sum": ("SHA256:" + "0" * 64, "MD5:x", "x:y:z"),
            "images": ("nobody", "x"),
            "client_id": ("a", "b"),
        }
        return rng.choice(fitting.get(name, ("true", "false", "1", "0", "x")))

    def _text(self, rng: random.Random) -> str:
        if rng.random() < 0.7:
            return rng.choice(TEXT)
        return "".join(chr(rng.choice((rng.randrange(256), rng.randrange(0xD7FF), 0x2E, 0x2F))) for _ in range(8))

    def _json(self, rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.06:
            depth = rng.choice((20, 200, 50_000))
            return rng.choice((b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth))
        if kind < 0.1:
            return rng.choice((b"", b"{", b"[1]", b"5", b'"x"', b"null", b"\xff\xfe", b'{"a":}', b"9" * 5000))
        if kind < 0.12:
            return json.dumps({"client_id": "x" * rng.choice((2_000, 300_000, 1_200_000))}).encode()
        value = {rng.choice(OPTIONS): self._value(rng) for _ in range(rng.choice((0, 0, 0, 1, 2, 4)))}
        return json.dumps(value).encode()

    def _value(self, rng: random.Random) -> Any:
        if rng.random() < 0.5:
            return rng.choice((rng.choice(VALUES), self._text(rng)))
        return rng.choice(FITTING)

    def _body(self, rng: random.Random, method: str, path: str, starting: bool) -> tuple[dict[str, str], bytes]:
        if starting:
            # Always with an unknown option: else it would start.
            options = {"nobody knows": 1, rng.choice(OPTIONS): self._value(rng)}
            bad = rng.choice((json.dumps(options).encode(), b"[" * 50_000, b'{"steps": NaN}', b"[1]", b"{"))
            return {"Content-Type": "application/json"}, bad
        if method in ("GET", "HEAD", "DELETE") and rng.random() < 0.9:
            return {}, b""
        if path.startswith("/activelearning") or rng.random() < 0.08:
            return {"Content-Type": rng.choice(TYPES) if rng.random() < 0.3 else TYPES[0]}, self._json(rng)
        if rng.random() < 0.05:
            return {"Content-Type": rng.choice(TYPES)}, rng.randbytes(rng.randrange(2_000))
        return self._form(rng, path)

    def _form(self, rng: random.Random, path: str) -> tuple[dict[str, str], bytes]:
        parts = []
        fields = ["params", "info"] if rng.random() < 0.8 else ["params", "params", "wsi", "x\0", ""]
        parts += [(name, None, self._json(rng)) for name in fields if rng.random() < 0.7]
        for name in {"/session/": ("files",), "/datastore/label": ("label",)}.get(path, ("file", "label")):
            for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 1, 2))):
                parts.append((name, rng.choice(NAMES[:5]) if rng.random() < 0.7 else rng.choice(NAMES), b""))
        body = b""
        for name, filename, data in parts:
            head = f'Content-Disposition: form-data; name="{name}"'
            if filename is not None:
                head += f'; filename="{filename}"'
                data = self._file(rng, filename, self.labels if name == "label" else self.volumes)
            body += b"--b\r\n" + head.encode(errors="replace") + b"\r\n\r\n" + data + b"\r\n"
        body += b"--b--\r\n"
        if rng.random() < 0.06:
            body = body[: rng.randrange(len(body))]
        return {"Content-Type": "multipart/form-data; boundary=b"}, body

    def _file(self, rng: random.Random, name: str, whole: Volumes) -> bytes:
        suffix = next((s for s in whole if name.lower().endswith(s)), rng.choice(tuple(whole)))
        data = whole[suffix]
        return rng.choice(SPOILT)(data, rng) if rng.random() < 0.5 else data


def fuzz(url: str, make: Callable[[int], Request], numbers: Sequence[int], *, threads: int = 4) -> Outcome:
    """Send the requests and return their outcome."""
    where = urlsplit(url)
    outcome = Outcome()

    def some(mine: Sequence[int]) -> None:
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=_TIMEOUT_S)
        for number in mine:
            request = make(number)
            try:
                status, text = _sent(connection, request)
            except TimeoutError:
                outcome.faults.append(f"{number}: no answer in {_TIMEOUT_S} s to {request}")
                connection.close()
                continue
            except (http.client.HTTPException, OSError) as error:
                # The server may close the connection before it has read a refused body.
                connection.close()
                if len(request.body) < 100_000:
                    outcome.faults.append(f"{number}: {error!r} to {request}")
                continue
            outcome.statuses[status] = outcome.statuses.get(status, 0) + 1
            if status >= 500 and status != 507:
                outcome.faults.append(f"{number}: {status} {text[:200]!r} to {request}")
        connection.close()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, [numbers[start::threads] for start in range(threads)]))
    return outcome


def _sent(connection: http.client.HTTPConnection, request: Request) -> tuple[int, bytes]:
    for attempt in range(2):
        try:
            connection.putrequest(request.method, request.target, skip_host="Host" in request.headers)
            for name, value in request.headers.items():
                connection.putheader(name, value)
            if request.body or request.method in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(request.body)))
            connection.endheaders(request.body or None)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            # A kept connection may have been closed since.
            connection.close()
            if attempt:
                raise
    raise AssertionError


def _operation(described: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] = described["paths"].get(path, {}).get(method.lower(), {})
    return found


def _query_names(operation: dict[str, Any]) -> list[str]:
    listed = [item["name"] for item in operation.get("parameters", ()) if item["in"] == "query"]
    return listed or ["image", "id", "tag"]


def _quoted(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")
