"""``deformux-label serve``: check the arguments, then start MONAI Label's own server with them."""

from __future__ import annotations

import getpass
import os
import socket
import ssl
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deformux_label.cli.admin import audit, users_app
from deformux_label.cli.command_log import recorded
from deformux_label.cli.common import app_folder, open_studies, print_table, refuse
from deformux_label.cli.studies import studies_app

__all__ = ["app"]

app = typer.Typer(
    help="One-click segmentation with DeformUX-Net for 3D Slicer.", no_args_is_help=True, pretty_exceptions_enable=False
)


labels_app = typer.Typer(help="Every label that was ever submitted.", no_args_is_help=True)
app.add_typer(labels_app, name="labels")
app.add_typer(users_app, name="users")
app.command("audit")(audit)
app.add_typer(studies_app, name="studies")

_Studies = Annotated[Path, typer.Option(help="Folder with the volumes.")]
_Tag = Annotated[str, typer.Option(help="Which label of a volume.")]


@labels_app.command("list")
def list_labels(
    studies: _Studies,
    image: Annotated[str, typer.Argument(help="Id of one volume; all of them without it.")] = "",
    tag: _Tag = "final",
) -> None:
    """List the revisions of labels, with who submitted them, when, and over which model's proposal."""
    from fastapi import HTTPException

    table = Table("image", "revision", "time", "annotator", "model", "what", box=None)
    revisions = open_studies(studies).revisions
    for name in [image] if image else revisions.known():
        try:
            history = revisions.history(name, tag)
        except HTTPException as error:
            refuse(error.detail)
        if image and not history:
            refuse(f"image {image!r} has no revisions of a label {tag!r}")
        for revision in history:
            what = "deleted" if revision.deleted else revision.sha256[:12]
            what += f", restored from {revision.restored_from}" if revision.restored_from else ""
            when = datetime.fromtimestamp(revision.time).isoformat(" ", "seconds")
            table.add_row(name, str(revision.number), when, revision.annotator, revision.model_version or "", what)
    print_table(table)


@labels_app.command("restore")
def restore_label(
    studies: _Studies,
    image: Annotated[str, typer.Argument(help="Id of the volume.")],
    revision: Annotated[int, typer.Argument(help="Number of the revision that becomes the current one again.")],
    tag: _Tag = "final",
) -> None:
    """Make an earlier revision of a label the current one; the present one stays as a revision."""
    from fastapi import HTTPException

    try:
        with recorded(studies, "restore label") as done:
            restored = open_studies(studies).restore_label(image, revision, getpass.getuser(), tag)
            done |= {"image": image, "tag": tag}
    except HTTPException as error:
        refuse(error.detail)
    typer.echo(f"Revision {revision} of image {image} is the current label again, as revision {restored.number}.")


@app.command()
def serve(
    studies: Annotated[str, typer.Option(help="Folder with the volumes; it is made if it does not exist.")],
    labels: Annotated[str, typer.Option(help="Comma-separated names of label values 1, 2, …")] = "",
    modality: Annotated[str, typer.Option(help="ct or mr.")] = "",
    preset: Annotated[str, typer.Option(help="tiny, small or base.")] = "",
    spacing: Annotated[str, typer.Option(help="Voxel size in mm, such as 1.5,1.5,2; or native.")] = "",
    patch_size: Annotated[str, typer.Option(help="Voxels of a patch, such as 96,96,96.")] = "",
    pretrained: Annotated[str, typer.Option(help="Weights to start from, or none.")] = "",
    auto_train: Annotated[str, typer.Option(help="Train after so many changed labels; 0 for never.")] = "",
    lease_minutes: Annotated[str, typer.Option(help="How long a handed-out volume is kept for its annotator.")] = "",
    cache_gb: Annotated[str, typer.Option(help="Gigabytes of memory that make the next click fast; 0 for none.")] = "",
    train_devices: Annotated[str, typer.Option(help="one, auto for all GPUs, or a list such as cuda:0,cuda:1.")] = "",
    allow_origin: Annotated[str, typer.Option(help="Comma-separated origins whose pages may call the server.")] = "",
    max_upload_gb: Annotated[str, typer.Option(help="Most gigabytes of an uploaded volume.")] = "",
    max_voxels: Annotated[str, typer.Option(help="Most voxels of a volume that is read.")] = "",
    users: Annotated[str, typer.Option(help="File with the users; a user in it switches the login on.")] = "",
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen to the network without a login.")] = False,
    ssl_cert: Annotated[str, typer.Option(help="Certificate file (PEM) for https; needs --ssl-key.")] = "",
    ssl_key: Annotated[str, typer.Option(help="Key file (PEM) of the certificate, without a passphrase.")] = "",
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
) -> None:
    """Serve a folder of volumes to 3D Slicer and other MONAI Label clients."""
    # Read when OpenMP is loaded, with the imports below: threads that wait must not spin while a training needs the
    # processors.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from deformux_label.lib.configs.project import InvalidOption, Project
    from deformux_label.lib.configs.server import ServerOptions
    from deformux_label.web.listening import reason_not_to_start

    of_server = {
        "allow_origin": allow_origin,
        "max_upload_gb": max_upload_gb,
        "max_voxels": max_voxels,
        "users": users,
        "insecure": str(insecure).lower(),
    }
    conf = {
        "labels": labels,
        "modality": modality,
        "preset": preset,
        "spacing": spacing,
        "patch_size": patch_size,
        "pretrained": pretrained,
        "auto_train": auto_train,
        "lease_minutes": lease_minutes,
        "cache_gb": cache_gb,
        "train_devices": train_devices,
    }
    try:
        options = ServerOptions.from_conf(of_server)
        project = Project.from_conf(conf)
    except InvalidOption as error:
        refuse(str(error))
    if not studies or studies.startswith(("http://", "https://")) or Path(studies).is_file():
        refuse(f"studies must be a folder with volumes; got {studies!r}")
    tls = _checked_tls(ssl_cert, ssl_key)
    if reason := reason_not_to_start(host, options.users, insecure=options.insecure):
        refuse(reason)
    _check_free(host, port)
    conf = {**project.to_conf(), **{key: value for key, value in of_server.items() if value}}
    _start(studies, conf, host, port, tls)


def _start(studies: str, conf: Mapping[str, str], host: str, port: int, tls: Sequence[str]) -> None:
    """Become MONAI Label's own server."""
    arguments = ["start_server", "--app", str(app_folder()), "--studies", studies, "--host", host, "--port", str(port)]
    arguments += ["--uvicorn_app", "deformux_label.server:app", *tls]
    for key, value in conf.items():
        arguments += ["--conf", key, value]
    scheme = "https" if tls else "http"
    typer.echo(f"In 3D Slicer's module MONAI Label, enter the server address {scheme}://{host}:{port}")
    sys.stdout.flush()
    # MLflow, where it is not switched off, refuses what MONAI Label sets up.
    os.environ.setdefault("MONAI_LABEL_TRACKING_ENABLED", "false")
    from monailabel.main import Main

    sys.argv = ["monailabel", *arguments]
    Main().run()


def _checked_tls(certificate: str, key: str) -> list[str]:
    """MONAI Label's arguments for a certificate and its key, which are tried first; none without them."""
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
        # Without this, OpenSSL would ask at the terminal, at each start.
        raise ValueError("the key has a passphrase; remove it with openssl pkey and keep the file to yourself")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, passphrase)
    except (OSError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) and not isinstance(error, ssl.SSLError) else _of_ssl(error)
        refuse(f"--ssl-cert {certificate} and --ssl-key {key} do not make a pair for https: {reason}")
    return ["--ssl_certfile", str(Path(certificate).resolve()), "--ssl_keyfile", str(Path(key).resolve())]


def _of_ssl(error: Exception) -> str:
    """OpenSSL's reason, such as KEY_VALUES_MISMATCH, in words; what is no PEM file has none."""
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else "they are not PEM files"


def _check_free(host: str, port: int) -> None:
    if not 1 <= port <= 65535:
        refuse(f"port must be between 1 and 65535; got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        refuse(f"cannot listen on {host}:{port}: {error.strerror or error}; give another --port or --host")
