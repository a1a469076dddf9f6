"""The login of a running server: permissions of roles, and the names under which work is recorded."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import pytest
from live import (
    APP,
    CONF,
    LABELS,
    LiveServer,
    Volume,
    project_of,
)
from logged_in import (
    BY_ROLE,
    bearer,
    call,
    client_like_the_plugins,
    headers_of,
    password,
    routes,
)
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from deformux_label.lib.requests.roles import ROLES, may

# A permitted call would start processes that outlive the test.
_COSTLY = {("POST", "/scoring/")}


@pytest.fixture
def server(login_server: LiveServer) -> LiveServer:
    return login_server


@pytest.fixture
def cases(login_cases: dict[str, Volume]) -> dict[str, Volume]:
    return login_cases


@pytest.fixture
def tokens(login_tokens: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    return login_tokens


def test_without_a_token_nothing_is_told(server: LiveServer) -> None:
    for method, path, role in routes():
        answer = call(server, method, path)
        if role is None:
            assert answer.status_code not in (403,), (method, path)
        else:
            assert answer.status_code == 401, (method, path)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    for method, path in (
        ("POST", "/reload"),
        ("GET", "/static/favicon.ico"),
        ("GET", "/proxy/dicom/studies"),
        ("PUT", "/x"),
    ):
        assert call(server, method, path).status_code in (401, 404, 405), path
    assert call(server, "GET", "/auth/").json()["enabled"] is True


@pytest.mark.parametrize("role", ROLES)
def test_every_route_for_every_role(server: LiveServer, tokens: dict[str, dict[str, str]], role: str) -> None:
    headers = tokens[BY_ROLE[role]]
    for method, path, least in routes():
        if least is None:
            continue
        if may(role, least):
            if (method, path) not in _COSTLY:
                answer = call(server, method, path, headers)
                assert answer.status_code not in (401, 403), (method, path, answer.text)
        else:
            answer = call(server, method, path, headers)
            assert answer.status_code == 403, (method, path)
            assert f"needs the role {least} or higher" in answer.json()["detail"]


@pytest.fixture(params=["monailabel", "slicer"])
def library(request: pytest.FixtureRequest, slicer_client: ModuleType) -> Any:
    return MONAILabelClient if request.param == "monailabel" else slicer_client


def _failures(library: Any) -> type[Exception]:
    return library.client.MONAILabelClientException if isinstance(library, ModuleType) else MONAILabelClientException


def test_the_stock_clients(
    server: LiveServer, cases: dict[str, Volume], library: Any, tmp_path: Path, tokens: dict[str, dict[str, str]]
) -> None:
    def client(token: Any = None) -> Any:
        return client_like_the_plugins(library, server, tmp_path, token)

    assert client().auth_enabled()
    for refused in (client().info, lambda: client().auth_token("anna", "wrong")):
        with pytest.raises(_failures(library)) as error:
            refused()
        assert error.value.status_code == 401
    assert not client().auth_valid_token()
    token = client().auth_token("anna", password("anna"))
    assert client(token).auth_valid_token()
    assert client(token).info()["name"] == "DeformUX Label"
    sample = client(token).next_sample("first", {})
    # Slicer's SampleData sends no header and no cookie if the path from the server does not exist.
    url = f"{server.url}/datastore/image?image={sample['id']}"
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == cases[sample["id"]].image.read_bytes()
    file, params = client(token).infer("segmentation", sample["id"], {"result_extension": ".nrrd"})
    assert params["model_version"] == "v0001"
    assert Path(file).is_file()
    info = {"label_info": [{"name": name, "idx": number} for number, name in enumerate(LABELS, 1)]}
    saved = client(token).save_label(sample["id"], str(cases[sample["id"]].label), "final", info)
    assert saved["image"] == sample["id"]
    assert Path(client(token).download_label(sample["id"], "final")).is_file()
    assert client(token).datastore()["objects"][sample["id"]]["labels"]
    assert not client(token).train_status(check_if_running=True)
    name = f"new {library.__name__}"
    assert client(token).upload_image(str(cases["case_7"].image), name)["image"] == name
    session = client(token).create_session(str(cases["case_0"].image))["session_id"]
    file, _ = client(token).infer("segmentation", "MRHead", {}, session_id=session)
    assert nib.load(file).shape == cases["case_0"].truth.shape
    client(token).remove_session(session)
    with pytest.raises(_failures(library)) as error:
        client(token).train_stop()
    assert "needs the role admin" in error.value.msg
    client(client().auth_token("ada", password("ada"))).train_stop()
    for image in (name, sample["id"]):
        kind = {"id": image} if image == name else {"id": image, "tag": "final"}
        call(server, "DELETE", f"/datastore/{'image' if image == name else 'label'}", tokens["rob"], params=kind)


@pytest.fixture
def log(login_cases: dict[str, Volume]) -> Path:
    return project_of(CONF).state_folder(APP, str(login_cases["case_0"].image.parent)) / "audit.jsonl"


def lines_of(log: Path, what: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, log.read_text().splitlines()) if line["what"] == what]


def test_a_handed_out_image_is_fetched_without_a_token(
    server: LiveServer, log: Path, tokens: dict[str, dict[str, str]]
) -> None:
    def fetch(image: str, **headers: str) -> int:
        return call(server, "GET", "/datastore/image", headers, params={"image": image}).status_code

    # A proxy on the same machine forwards the address of the client.
    elsewhere = {"X-Forwarded-For": "10.0.0.7"}
    here = {"X-Forwarded-For": "10.0.0.8"}
    assert fetch("case_3", **here) == 401
    sample = call(server, "POST", "/activelearning/random", {**tokens["andy"], **here}, json={}).json()["id"]
    other = next(f"case_{number}" for number in range(8) if f"case_{number}" != sample)
    assert fetch(sample, **elsewhere) == 401, "another address"
    assert fetch(other, **here) == 401, "another image"
    assert call(server, "DELETE", "/datastore/image", here, params={"id": sample}).status_code == 401
    assert call(server, "GET", f"/datastore/image?image={sample}&image={other}", here).status_code == 400
    assert call(server, "GET", "/datastore/label", here, params={"label": sample, "tag": "final"}).status_code == 401
    assert fetch(sample, **here, **bearer("forged")) == 401, "a wrong token is worse than none"
    assert [fetch(sample, **here) for _ in range(4)] == [200, 200, 200, 401]
    call(server, "DELETE", "/deformux/leases", tokens["andy"], params={"image": sample})
    fetched = lines_of(log, "download image")[-3:]
    assert [(line["user"], line["address"], line.get("without_token")) for line in fetched] == [
        ("andy", "10.0.0.8", True)
    ] * 3
    assert fetch(sample, **here, **tokens["andy"]) == 200
    assert "without_token" not in lines_of(log, "download image")[-1]


def test_a_logout_ends_fetching_without_a_token(server: LiveServer, tokens: dict[str, dict[str, str]]) -> None:
    here = {"X-Forwarded-For": "10.0.0.18"}
    token = headers_of(server, "anna")["anna"]
    sample = call(server, "POST", "/activelearning/random", {**token, **here}, json={}).json()["id"]
    assert call(server, "GET", "/datastore/image", here, params={"image": sample}).status_code == 200
    assert call(server, "POST", "/auth/logout", token).status_code == 303
    assert call(server, "GET", "/datastore/image", here, params={"image": sample}).status_code == 401
    call(server, "DELETE", "/deformux/leases", tokens["rob"], params={"image": sample})


def test_work_is_recorded_under_the_logged_in_name(
    server: LiveServer, cases: dict[str, Volume], tokens: dict[str, dict[str, str]]
) -> None:
    spoof = {"client_id": "rob", "user": "rob"}
    assert call(server, "POST", "/activelearning/first", tokens["anna"], json=spoof).status_code == 400
    claimed = {"client_id": "rob"}
    sample = call(server, "POST", "/activelearning/first", tokens["anna"], json=claimed).json()["id"]
    leases = call(server, "GET", "/deformux/leases", tokens["rita"]).json()["leases"]
    assert {lease["image"]: lease["annotator"] for lease in leases}[sample] == "anna"
    # Anna's label started from the proposal that she got, whichever client ids she uses.
    params = {"params": (None, json.dumps({**spoof, "client_id": "one"}))}
    inferred = call(server, "POST", f"/infer/segmentation?image={sample}", tokens["anna"], files=params)
    assert inferred.status_code == 200, inferred.text

    def submit(name: str, **said: str) -> None:
        answer = call(
            server,
            "PUT",
            f"/datastore/label?image={sample}",
            tokens[name],
            data={"params": json.dumps(said)},
            files={"label": ("label.nii.gz", cases[sample].label.read_bytes())},
        )
        assert answer.status_code == 200, answer.text

    forged = {"annotator": "ada", "model_version": "v0999", "model": "mine", "revision": "77", "restored_from": "5"}
    submit("anna", **{**spoof, "client_id": "two"}, **forged)
    submit("andy", client_id="anna")
    query = {"image": sample, "revision": 1, "client_id": "anna"}
    restored = call(server, "POST", "/deformux/labels/restore", tokens["rob"], params=query)
    assert restored.json()["annotator"] == "rob"
    # Information from others about a label does not change its author.
    label = {"label": sample, "tag": "final"}
    claim = {"info": json.dumps({**spoof, **forged, "user": "andy", "note": "fine"})}
    assert call(server, "PUT", "/datastore/label/info", tokens["andy"], params=label, data=claim).ok
    known = call(server, "GET", "/datastore/label/info", tokens["rita"], params=label).json()
    assert (known["user"], known["note"]) == ("rob", "fine")
    assert {name: known.get(name) for name in forged} == {
        **dict.fromkeys(forged),
        "revision": restored.json()["number"],
        "model_version": "v0001",
    }
    claim = {"info": json.dumps({"user": "ada", "annotator": "ada", "seen": True})}
    assert call(server, "PUT", "/datastore/image/info", tokens["andy"], params={"image": sample}, data=claim).ok
    known = call(server, "GET", "/datastore/image/info", tokens["rita"], params={"image": sample}).json()
    assert (known.get("user"), known.get("annotator"), known["seen"]) == (None, None, True)
    gone = call(server, "DELETE", "/datastore/label", tokens["rob"], params={"id": sample, "tag": "final"})
    assert gone.status_code == 200
    history = call(server, "GET", "/deformux/labels/revisions", tokens["rita"], params={"image": sample}).json()
    made = [(revision["annotator"], revision["model_version"]) for revision in history["revisions"]]
    assert made[-4:] == [("anna", "v0001"), ("andy", None), ("rob", "v0001"), ("rob", None)]
    assert call(server, "POST", "/deformux/versions/v0001/publish?client_id=x", tokens["ada"]).ok
    assert call(server, "GET", "/deformux/versions", tokens["rita"]).json()["history"][-1]["by"] == "ada"


def test_an_annotator_cannot_end_the_leases_of_others(server: LiveServer, tokens: dict[str, dict[str, str]]) -> None:
    def sample(name: str) -> str:
        return call(server, "POST", "/activelearning/random", tokens[name], json={}).json()["id"]

    def end(name: str, image: str) -> int:
        return call(server, "DELETE", "/deformux/leases", tokens[name], params={"image": image}).status_code

    def holders() -> dict[str, str]:
        leases = call(server, "GET", "/deformux/leases", tokens["rita"]).json()["leases"]
        return {lease["image"]: lease["annotator"] for lease in leases}

    robs, annas = sample("rob"), sample("anna")
    assert end("anna", robs) == 403
    assert end("andy", annas) == 403
    assert (holders()[robs], holders()[annas]) == ("rob", "anna")
    assert end("rob", annas) == 200
    assert end("rob", robs) == 200
    assert end("anna", sample("anna")) == 200
    assert end("ada", sample("andy")) == 200


def test_a_reader_stores_nothing(server: LiveServer, tokens: dict[str, dict[str, str]]) -> None:
    def infer(**params: Any) -> Any:
        files = {"params": (None, json.dumps(params))}
        return call(server, "POST", "/infer/segmentation?image=case_6", tokens["rita"], files=files)

    assert infer().status_code == 200
    refused = infer(save_label=True, label_tag="final")
    assert refused.status_code == 403
    assert "role annotator" in refused.json()["detail"]
    refused = infer(uncertainty="on")
    assert refused.status_code == 403
    assert "role annotator" in refused.json()["detail"]
    objects = call(server, "GET", "/datastore/?output=all", tokens["rita"]).json()["objects"]
    assert objects["case_6"]["labels"] == {}


def test_turns_belong_to_logins(server: LiveServer, tokens: dict[str, dict[str, str]]) -> None:
    """A login with many client ids counts as one client, and does not overtake others."""
    seen: set[str] = set()

    def infer(number: int) -> int:
        files = {"params": (None, json.dumps({"client_id": f"client {number}"}))}
        return call(server, "POST", "/infer/segmentation?image=case_5", tokens["anna"], files=files).status_code

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(infer, number) for number in range(8)]
        while not all(future.done() for future in running):
            for device in call(server, "GET", "/deformux/inferences", tokens["rita"]).json().values():
                seen |= {device["running"], *device["waiting"]}
    assert [future.result() for future in running] == [200] * 8
    assert seen == {"anna"}
