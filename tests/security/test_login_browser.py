"""Logging in with a browser: the page, the cookie and the way back, on MONAI Label's own command."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from browser import needs_chromium, open_page
from live import CONF, LiveServer, stock_command, write_volume
from logged_in import make_users, password

HTML = {"Accept": "text/html,application/xhtml+xml;q=0.9"}


@pytest.fixture(scope="module")
def server(start_here: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    folder = tmp_path_factory.mktemp("browsed")
    write_volume(folder / "studies" / "case_1.nii.gz", folder / "truth" / "case_1.nii.gz", spacing=(4, 4, 4))
    users = make_users(folder / "users.json")
    return start_here(folder / "studies", {**CONF, "users": str(users.path)}, stock_command)


def post(server: LiveServer, session: requests.Session, path: str, **form: str) -> requests.Response:
    return session.post(f"{server.url}{path}", data=form, headers=HTML, timeout=30, allow_redirects=False)


def test_browsers_get_the_page_and_programs_do_not(server: LiveServer) -> None:
    for path in ("/", "/docs", "/info/", "/openapi.json"):
        shown = requests.get(f"{server.url}{path}", headers=HTML, timeout=30, allow_redirects=False)
        assert (shown.status_code, shown.headers["Location"]) == (303, f"/auth/login?next={path}")
        for accept in ("*/*", "application/json"):
            answer = requests.get(f"{server.url}{path}", headers={"Accept": accept}, timeout=30, allow_redirects=False)
            assert answer.status_code == 401
    answer = requests.post(f"{server.url}/train/segmentation", headers=HTML, timeout=30, allow_redirects=False)
    assert answer.status_code == 401


def test_the_page_loads_nothing_external(server: LiveServer) -> None:
    page = requests.get(f"{server.url}/auth/login", timeout=30)
    assert page.status_code == 200
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    for part in ("form-action 'self'", "frame-ancestors 'none'", "base-uri 'none'"):
        assert part in policy
    assert "unsafe" not in policy
    assert page.headers["Cache-Control"] == "no-store"
    assert not re.search(r"<script|<img|<link|@import|url\(|https?://", page.text)


def test_the_pages_of_the_api_load_nothing_external(server: LiveServer) -> None:
    session = requests.Session()
    post(server, session, "/auth/login", username="anna", password=password("anna"))
    for path in ("/", "/docs"):
        page = session.get(f"{server.url}{path}", timeout=30)
        assert page.status_code == 200
        assert "'unsafe" not in page.headers["Content-Security-Policy"].split("style-src")[0]
        loaded = re.findall(r"(?:src|href)=\"([^\"]*)\"", page.text)
        assert loaded
        for name in loaded:
            assert "//" not in name
            assert session.get(f"{server.url}/{name}", timeout=30).status_code == 200
            if name != "favicon.ico":
                assert requests.get(f"{server.url}/{name}", timeout=30).status_code == 401
    for name in ("favicon.png", "..%2f__init__.py", "core.py", ""):
        assert session.get(f"{server.url}/assets/{name}", timeout=30).status_code == 404


def test_the_cookie(server: LiveServer) -> None:
    session = requests.Session()
    wrong = post(server, session, "/auth/login", username="anna", password="a wrong one", next="/docs")
    assert wrong.status_code == 401
    assert "The user name or the password is wrong." in wrong.text
    assert 'value="anna"' in wrong.text
    assert 'value="/docs"' in wrong.text
    assert not session.cookies
    right = post(server, session, "/auth/login", username="anna", password=password("anna"), next="/docs")
    assert (right.status_code, right.headers["Location"]) == (303, "/docs")
    flags = {part.strip().lower() for part in right.headers["Set-Cookie"].split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/", "max-age=43200"} <= flags
    assert "secure" not in flags, "over http a browser would not send it back"
    assert session.get(f"{server.url}/docs", timeout=30).status_code == 200
    assert session.get(f"{server.url}/auth/token/valid", timeout=30).json()["username"] == "anna"
    # A header takes precedence over the cookie.
    assert session.get(f"{server.url}/info/", headers={"Authorization": "bearer x"}, timeout=30).status_code == 401
    stolen = dict(session.cookies)
    out = post(server, session, "/auth/logout")
    assert (out.status_code, out.headers["Location"]) == (303, "/auth/login")
    assert not session.cookies
    assert requests.get(f"{server.url}/info/", cookies=stolen, timeout=30).status_code == 401, "a logout ends the token"


@pytest.mark.parametrize(
    "target",
    [
        *("https://evil.example/", "//evil.example/", "/\\evil.example", "\\\\evil.example", "javascript:alert(1)"),
        *("/docs\r\nSet-Cookie: a=b", "/info/?x=//evil.example", "/datastore/../../x", "", "/auth/logout", "/no/such"),
    ],
)
def test_the_way_back_stays_on_the_server(server: LiveServer, target: str) -> None:
    session = requests.Session()
    answer = post(server, session, "/auth/login", username="anna", password=password("anna"), next=target)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    page = requests.get(f"{server.url}/auth/login", params={"next": target}, timeout=30)
    if "\n" in target:
        assert page.status_code == 400, "control characters do not pass the perimeter"
    else:
        assert 'name="next" value="/"' in page.text


def test_typed_text_is_not_run(server: LiveServer) -> None:
    name = '"><script>alert(1)</script>'
    page = post(server, requests.Session(), "/auth/login", username=name, password="a wrong one")
    assert page.status_code == 401
    assert "<script" not in page.text
    assert "&lt;script&gt;" in page.text


@needs_chromium
def test_in_a_real_browser(server: LiveServer, tmp_path: Path) -> None:
    async def visit() -> None:
        async with open_page(tmp_path) as page:
            await page.go(f"{server.url}/info/")
            assert await page.value("location.pathname + location.search") == "/auth/login?next=/info/"
            assert await page.value("document.activeElement.id") == "username"
            # The style is applied, so its hash in the policy is right.
            assert await page.value("getComputedStyle(document.querySelector('button')).color") == "rgb(255, 255, 255)"
            await page.type("anna")
            await page.press("Tab", 9)
            await page.type("a wrong one")
            await page.press("Enter", 13)
            await page.until("document.querySelector('[role=alert]') !== null")
            assert await page.value("document.getElementById('username').value") == "anna"
            await page.value("document.getElementById('password').focus()")
            await page.type(password("anna"))
            await page.press("Enter", 13)
            await page.until("location.pathname === '/info/' && document.readyState === 'complete'")
            assert "DeformUX Label" in await page.value("document.body.innerText")
            assert await page.value("document.cookie") == "", "no script can read it"
            (cookie,) = (await page.call("Network.getCookies", urls=[f"{server.url}/"]))["cookies"]
            assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
            await page.go(f"{server.url}/")
            await page.until("document.querySelectorAll('.opblock').length > 20")
            await page.go(f"{server.url}/docs")
            await page.until("document.body.innerText.includes('/activelearning/{strategy}')")
            # The browser reports only the 401 of the wrong password.
            assert all("401" in text or "favicon" in text for text in page.complaints), page.complaints

    asyncio.run(visit())
