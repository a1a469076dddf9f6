"""The login page for browsers: plain HTML without scripts or external files."""

from __future__ import annotations

import html

from starlette.responses import HTMLResponse

from deformux_label.web.content_policy import source_hash

__all__ = ["login_page"]

_STYLE = """
body { font: 16px/1.5 sans-serif; background: #f2f4f7; color: #1d2733; display: grid; place-items: center;
  min-height: 90vh; margin: 0 }
main { background: #fff; border: 1px solid #d5dbe3; border-radius: 8px; padding: 2rem; width: 20rem }
h1 { font-size: 1.25rem; margin: 0 0 1rem }
label { display: block; margin: .75rem 0 .25rem }
input { font: inherit; width: 100%; box-sizing: border-box; padding: .5rem; border: 1px solid #8b97a6;
  border-radius: 4px }
button { font: inherit; width: 100%; margin-top: 1.25rem; padding: .5rem; border: 0; border-radius: 4px;
  background: #1d5fa8; color: #fff }
[role=alert] { color: #a3141d; margin: 0 }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>DeformUX Label: log in</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>DeformUX Label</h1>
{alert}<form method="post" action="{action}">
<label for="username">User name</label>
<input id="username" name="username" value="{name}" autocomplete="username" required autofocus>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required>
<input type="hidden" name="next" value="{after}">
<button>Log in</button>
</form>
</main>
</body>
</html>
"""
_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src {source_hash(_STYLE)}; form-action 'self'; frame-ancestors 'none'; "
        "base-uri 'none'"
    ),
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not "no-referrer": browsers would then send the form with the origin "null".
    "Referrer-Policy": "same-origin",
}


def login_page(
    action: str,
    after: str,
    *,
    name: str = "",
    error: str = "",
    status: int = 200,
    more: dict[str, str] | None = None,
) -> HTMLResponse:
    """Return the login page; after a failed login it shows the error and the name.

    Args:
        action: URL that receives the form.
        after: path to open after the login.
        more: additional response headers.
    """
    alert = f'<p role="alert">{html.escape(error)}</p>\n' if error else ""
    page = _PAGE.format(
        style=_STYLE, alert=alert, action=html.escape(action), name=html.escape(name), after=html.escape(after)
    )
    return HTMLResponse(page, status_code=status, headers={**_HEADERS, **(more or {})})
