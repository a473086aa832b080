"""The Flower app that is sent to every site: a few lines that name the installed package."""

from __future__ import annotations

from pathlib import Path

from flwr_hpc import __version__
from flwr_hpc.files import publish

PYPROJECT = f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "flwr-hpc-run"
version = "{__version__}"
description = "Runs the installed flwr-hpc"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "flwr-hpc"

[tool.flwr.app.components]
serverapp = "flwr_hpc.server.server_app:app"
clientapp = "flwr_hpc.site.client_app:app"

[tool.flwr.app.config]
run-dir = ""
"""

CONNECTION = """\
[superlink]
default = "flwr-hpc"

[superlink.flwr-hpc]
address = "{address}"
{trust}
"""


def connection(address: str, certificate: Path | None = None) -> str:
    """Return Flower's connection file; without a certificate there is no TLS."""
    trust = "insecure = true" if certificate is None else f"root-certificates = '{certificate}'"
    return CONNECTION.format(address=address, trust=trust)


def write_bundle(folder: Path, address: str, certificate: Path | None = None) -> Path:
    """Write the app and Flower's connection file under `folder` (FLWR_HOME); return the app."""
    publish(folder / "config.toml", connection(address, certificate))
    publish(folder / "app" / "pyproject.toml", PYPROJECT)
    return folder / "app"
