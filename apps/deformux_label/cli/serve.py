"""``deformux-label serve``: checks the options, then starts MONAI Label's server with them."""

from __future__ import annotations

import inspect
import os
import socket
import ssl
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deformux_label.cli.common import app_folder, refuse
from deformux_label.lib.configs.declared_options import (
    HOST,
    PORT,
    PROJECT_OPTIONS,
    SERVE_OPTIONS,
    SSL_CERT,
    SSL_KEY,
    WEB_OPTIONS,
    InvalidOption,
    Option,
)

__all__ = ["serve"]


def _with_options(options: Iterable[Option[Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the parameter ``studies``, and one for each declared option."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        studies = Annotated[str, typer.Option(help="Folder with the volumes; created if it does not exist.")]
        parameters = [_parameter("studies", studies), *map(_parameter_of, options)]
        # Typer reads a command's parameters from these two.
        vars(command)["__signature__"] = inspect.Signature(parameters)
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _parameter_of(option: Option[Any]) -> inspect.Parameter:
    """Return a parameter that is empty, or false, by default."""
    text = option.help if option.help.startswith("`") else option.help[:1].upper() + option.help[1:]
    shown = option.default or option.default_note
    details = typer.Option(option.flag, help=_without_markup(text) + ".", show_default=_without_markup(shown))
    if option.is_flag:
        return _parameter(option.name, Annotated[bool, details], False)
    return _parameter(option.name, Annotated[str, details], "")


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _without_markup(text: str) -> str:
    return text.replace("`", "")


@_with_options(SERVE_OPTIONS)
def serve(studies: str, **options: str | bool) -> None:
    """Serve a folder of volumes to 3D Slicer and other MONAI Label clients."""
    # The imports below load OpenMP, which reads this: idle threads must not spin while a training needs the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from deformux_label.lib.configs.project import Project
    from deformux_label.lib.configs.server import ServerOptions
    from deformux_label.web.listening import reason_not_to_start

    given = {name: str(value).lower() if isinstance(value, bool) else value for name, value in options.items()}
    given = {name: value for name, value in given.items() if value}
    of_server = {option.name: given[option.name] for option in WEB_OPTIONS if option.name in given}
    try:
        server = ServerOptions.from_conf(of_server)
        project = Project.from_conf(
            {option.name: given[option.name] for option in PROJECT_OPTIONS if option.name in given}
        )
        host, port = HOST.value(given), PORT.value(given)
    except InvalidOption as error:
        refuse(str(error))
    if not studies or studies.startswith(("http://", "https://")) or Path(studies).is_file():
        refuse(f"studies must be a folder with volumes; got {studies!r}")
    tls = _checked_tls(SSL_CERT.value(given), SSL_KEY.value(given))
    if reason := reason_not_to_start(host, server.users, insecure=server.insecure):
        refuse(reason)
    _check_free(host, port)
    _start(studies, {**project.to_conf(), **of_server}, host, port, tls)


def _start(studies: str, conf: Mapping[str, str], host: str, port: int, tls: Sequence[str]) -> None:
    """Run MONAI Label's own server in this process."""
    arguments = ["start_server", "--app", str(app_folder()), "--studies", studies, "--host", host, "--port", str(port)]
    arguments += ["--uvicorn_app", "deformux_label.server:app", *tls]
    for key, value in conf.items():
        # Its parser would take -175,250 for an option, but nothing with a space in it.
        arguments += ["--conf", key, f" {value}" if value.startswith("-") else value]
    scheme = "https" if tls else "http"
    typer.echo(f"In 3D Slicer's module MONAI Label, enter the server address {scheme}://{host}:{port}")
    sys.stdout.flush()
    # Tracking is off, because MLflow refuses MONAI Label's set-up.
    os.environ.setdefault("MONAI_LABEL_TRACKING_ENABLED", "false")
    from monailabel.main import Main

    sys.argv = ["monailabel", *arguments]
    Main().run()


def _checked_tls(certificate: str, key: str) -> list[str]:
    """Return MONAI Label's arguments for a certificate and its key, after loading them; empty without them."""
    if not certificate and not key:
        return []
    if not certificate or not key:
        refuse(f"https needs both --ssl-cert and --ssl-key; got only {'--ssl-cert' if certificate else '--ssl-key'}")
    for option, path in (("--ssl-cert", certificate), ("--ssl-key", key)):
        try:
            Path(path).read_bytes()
        except OSError as error:
            refuse(f"{option} {path} cannot be read: {error.strerror}")

    def passphrase() -> str:
        # Otherwise OpenSSL would ask for it at the terminal at each start.
        raise ValueError("the key has a passphrase; remove it with openssl pkey, and let no other user read the file")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, passphrase)
    except (OSError, ValueError) as error:
        own = isinstance(error, ValueError) and not isinstance(error, ssl.SSLError)
        reason = str(error) if own else _ssl_reason(error)
        refuse(f"--ssl-cert {certificate} and --ssl-key {key} do not match or cannot be used for https: {reason}")
    return ["--ssl_certfile", str(Path(certificate).resolve()), "--ssl_keyfile", str(Path(key).resolve())]


def _ssl_reason(error: Exception) -> str:
    """Return OpenSSL's reason, such as KEY_VALUES_MISMATCH, in words; without a reason, the files are not PEM."""
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else "they are not PEM files"


def _check_free(host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        refuse(f"cannot listen on {host}:{port}: {error.strerror or error}; give another --port or --host")
