"""Checks of host, origin, route and size before anything else, under both ways to start."""

from __future__ import annotations

import functools
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from attacks import exchange, refusal, scan
from live import CONF, WAYS, LiveServer

from deformux_label.web.route_roles import OFFERED

ALLOWED = "https://viewer.hospital.org"
EVIL = "http://evil.example"


@pytest.fixture(scope="module")
def started(
    start_here: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], LiveServer]:
    """Start a server in one of two ways: once each, in whatever order tests ask for them."""

    @functools.cache
    def start(way: str) -> LiveServer:
        studies = tmp_path_factory.mktemp("guarded") / "studies"
        studies.mkdir()
        scan(studies / "one.nii.gz")
        return start_here(studies, {**CONF, "allow_origin": ALLOWED, "max_upload_gb": "0.002"}, WAYS[way])

    return start


@pytest.fixture(params=WAYS)
def guarded(started: Callable[[str], LiveServer], request: pytest.FixtureRequest) -> LiveServer:
    """A server that allows one more origin and small uploads, started in each of the two ways."""
    return started(request.param)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "a/b", "2130706433"]
)
def test_an_unknown_host_is_refused(guarded: LiveServer, host: str) -> None:
    answer = exchange(guarded.url, "GET", "/info/", {"Host": host})
    assert re.match(rb"HTTP/1.1 (421|400) ", answer)
    assert b"liver" not in answer
    # DNS rebinding: the page's own origin has the unknown name, too.
    answer = exchange(guarded.url, "DELETE", "/datastore/image?id=one", {"Host": host, "Origin": f"http://{host}"})
    assert re.match(rb"HTTP/1.1 (421|400) ", answer)
    assert requests.get(f"{guarded.url}/datastore/image", params={"image": "one"}, timeout=30).ok


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "192.168.7.9", "viewer.hospital.org", "own name"])
def test_own_hosts_are_served(guarded: LiveServer, host: str) -> None:
    host = socket.gethostname() if host == "own name" else host
    for name in (host, f"{host}:8000", host.upper()):
        assert exchange(guarded.url, "GET", "/info/", {"Host": name}).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("origin", [EVIL, "null", "http://127.0.0.1:1", "https://127.0.0.1", f"{ALLOWED}.evil.example"])
def test_pages_of_other_origins_are_refused(guarded: LiveServer, origin: str) -> None:
    headers = {"Origin": origin}
    for method, path in [("GET", "info/"), ("POST", "train/segmentation"), ("DELETE", "datastore/image?id=one")]:
        answer = requests.request(method, f"{guarded.url}/{path}", headers=headers, timeout=30)
        refusal(answer, 403, "--allow-origin")
        assert "access-control-allow-origin" not in answer.headers
    headers["Access-Control-Request-Method"] = "POST"
    answer = requests.options(f"{guarded.url}/train/segmentation", headers=headers, timeout=30)
    refusal(answer, 403)
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_own_and_allowed_origins_are_served(guarded: LiveServer) -> None:
    own = requests.get(f"{guarded.url}/info/", headers={"Origin": guarded.url}, timeout=30)
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    allowed = requests.get(f"{guarded.url}/info/", headers={"Origin": ALLOWED}, timeout=30)
    assert allowed.headers["access-control-allow-origin"] == ALLOWED
    preflight = requests.options(
        f"{guarded.url}/train/segmentation",
        headers={"Origin": ALLOWED, "Access-Control-Request-Method": "POST"},
        timeout=30,
    )
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == ALLOWED
    # An allowed page must be able to read refusals, too.
    refused = requests.post(f"{guarded.url}/train/x", headers={"Origin": ALLOWED}, json={}, timeout=30)
    assert refused.headers["access-control-allow-origin"] == ALLOWED


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_forms_and_pictures_of_other_sites_are_refused(guarded: LiveServer, site: str) -> None:
    """Some browsers send them without an origin."""
    headers = {"Sec-Fetch-Site": site}
    refusal(requests.post(f"{guarded.url}/train/segmentation", headers=headers, timeout=30), 403)
    headers["Sec-Fetch-Mode"] = "no-cors"
    refusal(requests.get(f"{guarded.url}/datastore/dataset", headers=headers, timeout=30), 403)
    # A followed link.
    headers["Sec-Fetch-Mode"] = "navigate"
    assert requests.get(f"{guarded.url}/info/", headers=headers, timeout=30).ok
    refusal(requests.post(f"{guarded.url}/train/segmentation", headers=headers, timeout=30), 403)


REMOVED = [
    ("POST", "/reload"),
    ("GET", "/reload"),
    ("GET", "/static/favicon.ico"),
    ("GET", "/static/ohif/index.html"),
    ("GET", "/ohif/"),
    ("GET", "/ohif/.."),
    ("GET", "/proxy/dicom/studies"),
    ("GET", "/proxy/dicom/wado/x"),
    ("POST", "/infer/wsi/segmentation"),
    ("POST", "/infer/wsi_v2/segmentation"),
    ("GET", "/model/info/segmentation"),
    ("GET", "/docs/oauth2-redirect"),
    ("GET", "/redoc"),
    ("GET", "/info"),
    ("GET", "//info/"),
    ("GET", "/info//"),
    ("GET", "/./info/"),
    ("GET", "/x/../info/"),
    ("GET", "/%2e%2e/info/"),
    ("GET", "/info/%00"),
    ("GET", "/info/%ff"),
    ("GET", "/info/%ED%A0%80"),
    ("GET", "/session/..%2f..%2fmain.py"),
    ("GET", "/session/..%5c..%5cmain.py"),
    ("GET", "/deformux/versions/.."),
    ("GET", "/deformux/versions/%2e%2e"),
    ("GET", "http://evil.example/info/"),
    ("GET", "/" + "x" * 20_000),
]


@pytest.mark.parametrize(("method", "target"), REMOVED)
def test_routes_that_are_not_offered_are_404(guarded: LiveServer, method: str, target: str) -> None:
    answer = exchange(guarded.url, method, target)
    assert answer.startswith(b"HTTP/1.1 404 "), answer[:200]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]


def test_another_method_is_405(guarded: LiveServer) -> None:
    for method, path in [("PATCH", "info/"), ("TRACE", "info/"), ("GET", "infer/segmentation"), ("HEAD", "info/")]:
        answer = requests.request(method, f"{guarded.url}/{path}", timeout=30)
        assert answer.status_code == 405
        assert method not in answer.headers["allow"]


def test_reloading_is_not_offered_and_leaves_nothing(guarded: LiveServer) -> None:
    process = psutil.Process(guarded.process.pid)
    (child,) = [p for p in [process, *process.children(recursive=True)] if p.net_connections("tcp")] or [process]
    before = child.num_threads(), len(child.open_files())
    for _ in range(20):
        assert requests.post(f"{guarded.url}/reload", timeout=30).status_code == 404
    assert (child.num_threads(), len(child.open_files())) == before


def test_the_api_description_lists_the_offered_routes(guarded: LiveServer) -> None:
    paths = requests.get(f"{guarded.url}/openapi.json", timeout=30).json()["paths"]
    listed = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    known = {(method, route.path) for route in OFFERED for method in route.methods}
    assert listed <= known
    assert len(listed) > 40
    assert not [path for path in paths if re.search("reload|proxy|ohif|static|wsi|login", path)]


def test_security_headers(guarded: LiveServer) -> None:
    for path in ("info/", "nowhere", "datastore/image?image=one", ""):
        headers = requests.get(f"{guarded.url}/{path}", timeout=30).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"


BAD_JSON: dict[str, tuple[bytes, str]] = {
    "surrogate": (rb'{"client_id": "\ud800"}', "Unicode"),
    "surrogate in a key": (rb'{"\udfff": 1}', "Unicode"),
    "surrogate deep inside": (rb'{"steps": [[{"a": ["\ud800"]}]]}', "Unicode"),
    "not UTF-8": (b'{"client_id": "\xff"}', "UTF-8"),
    "UTF-16": ('{"client_id": "x"}'.encode("utf-16"), "UTF-8"),
    "NaN": (b'{"steps": NaN}', "finite"),
    "Infinity": (b'{"steps": -Infinity}', "finite"),
    "1e999": (b'{"steps": 1e999}', "finite"),
    "2^63": (b'{"steps": 9223372036854775808}', "2^63"),
    "5,000 digits": (b'{"steps": ' + b"9" * 5000 + b"}", "2^63"),
    "deep": (b"[" * 100_000, "deep"),
    "deep and whole": (b'{"a":' * 40 + b"1" + b"}" * 40, "deep"),
    "broken": (b'{"a": ', "JSON"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_is_refused_at_the_door(guarded: LiveServer, kind: str) -> None:
    body, word = BAD_JSON[kind]
    headers = {"Content-Type": "application/json"}
    for path in ("train/segmentation", "train/", "activelearning/random", "scoring/dice", "batch/infer/segmentation"):
        refusal(requests.post(f"{guarded.url}/{path}", data=body, headers=headers, timeout=30), 400, word)
    if kind == "UTF-16":
        return
    for method, path, field in [
        ("POST", "infer/segmentation?image=one", "params"),
        ("PUT", "datastore/image/info?image=one", "info"),
        ("PUT", "datastore/label/info?label=one&tag=final", "info"),
        ("PUT", "datastore/updatelabelinfo?label=one&tag=final", "params"),
    ]:
        answer = requests.request(method, f"{guarded.url}/{path}", files={field: (None, body)}, timeout=30)
        refusal(answer, 400, word)


def test_bad_text_elsewhere_is_refused(guarded: LiveServer) -> None:
    for query in (b"image=%ff", b"image=%ED%A0%80", b"image=a%00b", b"image=a%0ab", b"%00=1"):
        answer = exchange(guarded.url, "GET", f"/datastore/image?{query.decode()}")
        assert answer.startswith(b"HTTP/1.1 400 "), answer[:200]
    assert exchange(guarded.url, "GET", "/datastore/image?image=" + "x" * 20_000).startswith(b"HTTP/1.1 414 ")
    kind = 'multipart/form-data; boundary="b"'
    for bad in (b'name="params\xff"', b'name="file"; filename="\xff.nii.gz"', b'name="file"; filename="a\0.nii.gz"'):
        body = b"--b\r\nContent-Disposition: form-data; " + bad + b"\r\n\r\nx\r\n--b--\r\n"
        answer = requests.post(
            f"{guarded.url}/infer/segmentation?image=one", data=body, headers={"Content-Type": kind}, timeout=30
        )
        refusal(answer, 400)
    for charset in ("unicode_escape", "punycode", "utf-7", "hex", "idna"):
        headers = {"Content-Type": f"{kind}; charset={charset}"}
        body = b'--b\r\nContent-Disposition: form-data; name="params"\r\n\r\n{"a": "\\ud800"}\r\n--b--\r\n'
        refusal(
            requests.post(f"{guarded.url}/infer/segmentation", data=body, headers=headers, timeout=30), 400, "UTF-8"
        )


def test_long_and_strange_names_are_404_on_every_route(guarded: LiveServer) -> None:
    for name in ("x" * 201, "é" * 101, "../one", ".hidden", " one", "a/b", "a\\b"):
        for method, path, query in [
            ("GET", "datastore/image", {"image": name}),
            ("GET", "datastore/image/info", {"image": name}),
            ("GET", "datastore/label", {"label": name, "tag": "final"}),
            ("GET", "datastore/label/info", {"label": name, "tag": "final"}),
            ("DELETE", "datastore/image", {"id": name}),
            ("DELETE", "datastore/", {"id": name}),
            ("DELETE", "datastore/label", {"id": name, "tag": "final"}),
            ("GET", "deformux/labels/revisions", {"image": name}),
            ("GET", "deformux/labels/revision", {"image": name, "revision": "1"}),
            ("POST", "deformux/labels/restore", {"image": name, "revision": "1"}),
            ("DELETE", "deformux/leases", {"image": name}),
        ]:
            refusal(requests.request(method, f"{guarded.url}/{path}", params=query, timeout=30), 404)
    for tag in ("../../x", "/tmp/x", "x" * 65, "a b", "."):
        query = {"image": "one", "revision": "1", "tag": tag}
        for method, path in [
            ("GET", "deformux/labels/revisions"),
            ("GET", "deformux/labels/revision"),
            ("POST", "deformux/labels/restore"),
        ]:
            answer = requests.request(method, f"{guarded.url}/{path}", params=query, timeout=30)
            refusal(answer, 400, "tag")
    for revision in ("0", "-1", "1000000000", "9" * 30):
        query = {"image": "one", "revision": revision}
        refusal(requests.get(f"{guarded.url}/deformux/labels/revision", params=query, timeout=30), 404)
    for version in ("v1", "x" * 300, "v0001%20", "latest"):
        answer = requests.get(f"{guarded.url}/deformux/versions/{version}", timeout=30)
        assert answer.status_code == 404


def test_bodies_are_bounded(guarded: LiveServer) -> None:
    json_type = {"Content-Type": "application/json"}
    large = b'{"client_id": "' + b"x" * 1_100_000 + b'"}'
    for path in ("train/segmentation", "activelearning/random"):
        refusal(requests.post(f"{guarded.url}/{path}", data=large, headers=json_type, timeout=30), 413, "1000000")
        chunked = requests.post(
            f"{guarded.url}/{path}", data=iter([large[:500_000], large[500_000:]]), headers=json_type, timeout=30
        )
        refusal(chunked, 413, "1000000")
    # Bodies of requests that need none.
    refusal(requests.get(f"{guarded.url}/info/", data=large, timeout=30), 413)
    volume = b"\0" * 5_000_000
    for method, path in [
        ("PUT", "datastore/image?image=large"),
        ("PUT", "datastore/?image=large"),
        ("PUT", "session/"),
        ("PUT", "datastore/label?image=one"),
        ("POST", "infer/segmentation"),
    ]:
        field = {"session/": "files", "datastore/label?image=one": "label"}.get(path, "file")
        answer = requests.request(method, f"{guarded.url}/{path}", files={field: ("large.nii", volume)}, timeout=30)
        refusal(answer, 413, "4000000")
    # A false length is noticed while the body streams.
    answer = exchange(guarded.url, "POST", "/train/segmentation", {"Content-Length": "10" * 15})
    assert re.match(rb"HTTP/1.1 (413|400) ", answer)


def test_forms_are_bounded(guarded: LiveServer) -> None:
    url = f"{guarded.url}/infer/segmentation?image=one"
    many: list[tuple[str, Any]] = [(f"field{number}", (None, "x")) for number in range(40)]
    refusal(requests.post(url, files=many, timeout=30), 413, "fields")
    many = [("file", (f"{number}.nii", b"x")) for number in range(3)]
    refusal(requests.post(url, files=many, timeout=30), 413, "files")
    refusal(requests.post(url, files={"params": (None, "x" * 1_000_001)}, timeout=30), 413, "field")
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    for body in (b"", b"--b", b"--b\r\n", b"--b\r\n\r\nx\r\n--b--", b"--c\r\n", b"--b\r\nX: y\r\n\r\n\r\n--b--\r\n"):
        refusal(requests.post(url, data=body, headers=kind, timeout=30), 400)
    refusal(requests.post(url, data=b"x", headers={"Content-Type": "multipart/form-data"}, timeout=30), 400, "boundary")
    head = b'--b\r\nContent-Disposition: form-data; name="x"\r\nA: ' + b"y" * 20_000
    answer = requests.post(url, data=head, headers=kind, timeout=30)
    assert answer.status_code in (400, 413)
    info = {"info": json.dumps({"x": "y" * 200_000})}
    answer = requests.put(f"{guarded.url}/datastore/image/info?image=one", data=info, timeout=30)
    refusal(answer, 413)


def test_unknown_options_are_refused(guarded: LiveServer) -> None:
    options = {"steps": 1, "note": "x" * 1000}
    refusal(requests.post(f"{guarded.url}/train/segmentation", json=options, timeout=30), 400, "note", "learning_rate")
    refusal(requests.post(f"{guarded.url}/train/", json={"other": {}}, timeout=30), 400, "other", "segmentation")
    refusal(requests.post(f"{guarded.url}/train/", json={"segmentation": 5}, timeout=30), 400)
    refusal(requests.post(f"{guarded.url}/scoring/dice", json=options, timeout=30), 400, "note")
    refusal(requests.post(f"{guarded.url}/activelearning/random", json=options, timeout=30), 400, "note")
    answer = requests.get(f"{guarded.url}/train/", timeout=30)
    assert answer.status_code == 404
    for client in (5, ["x"], "x" * 2000, "a\0b"):
        refusal(requests.post(f"{guarded.url}/activelearning/random", json={"client_id": client}, timeout=30), 400)


def test_params_do_not_choose_another_model(guarded: LiveServer) -> None:
    """The path decides the role: a reader who may segment must not edit."""
    for path, chosen, status in [("segmentation", "nobody", 200), ("nobody", "segmentation", 404)]:
        answer = requests.post(
            f"{guarded.url}/infer/{path}",
            params={"image": "one", "output": "json"},
            files={"params": (None, json.dumps({"model": chosen}))},
            timeout=60,
        )
        assert answer.status_code == status, answer.text


def test_routes_about_the_server_answer(guarded: LiveServer) -> None:
    for path, query in [("logs/", {"lines": "5"}), ("scoring/", {}), ("deformux/versions", {}), ("logs/gpu", {})]:
        answer = requests.get(f"{guarded.url}/{path}", params=query, timeout=60)
        assert answer.status_code in (200, 404)
    for lines in ("-1", "0", "99999999999999999999", "x"):
        answer = requests.get(f"{guarded.url}/logs/", params={"lines": lines}, timeout=30)
        refusal(answer, 422)
    assert requests.delete(f"{guarded.url}/scoring/", timeout=30).status_code in (200, 409)
    for version in ("v0001", "v9999"):
        refusal(requests.get(f"{guarded.url}/deformux/versions/{version}", timeout=30), 404)
    for check in ("SHA1:00", "zz", "SHA256:zz", ":", "MD5:" + "0" * 32):
        answer = requests.head(
            f"{guarded.url}/datastore/image", params={"image": "one", "check_sum": check}, timeout=30
        )
        assert answer.status_code in (400, 404)
    for limit in ("-1", "0", "9" * 30):
        answer = requests.get(f"{guarded.url}/datastore/dataset", params={"limit_cases": limit}, timeout=30)
        refusal(answer, 422)


def test_nothing_of_this_was_a_server_error(guarded: LiveServer) -> None:
    """Last in this file."""
    log = Path(guarded.log).read_text()
    assert "Traceback" not in log
