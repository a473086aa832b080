"""Who may join a server: certificates, invitations, and their end.

What is written here the gate reads, also while the server runs.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr_hpc import files
from flwr_hpc.config.invitation import FORMAT, Invitation, read_invitation, run_settings, versions
from flwr_hpc.config.schema import Config, ServeConfig
from flwr_hpc.config.validate import check_site_name
from flwr_hpc.errors import UserError, closest
from flwr_hpc.exchange.store import node_folder
from flwr_hpc.files import private_folder, publish
from flwr_hpc.flower import commands
from flwr_hpc.gate.certificate import new_certificate, new_key_pair
from flwr_hpc.gate.credentials import Credential, read_credentials, sha256, write_credentials
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.ssh.wheel import NAME, build_wheel

COMMAND_S = 90.0  # for Flower's commands

Runner = Callable[[Sequence[str]], str]  # Runs a command and returns what it prints


def prepare(run: RunDir, config: Config) -> list[Path]:
    """Make the server's certificate and the invitations of all expected sites, once.

    Who was sent settings that a resume has changed is invited anew: a site cannot go on with others
    than the run's, and its former invitation is worth nothing.
    """
    assert config.serve.address is not None
    if not run.certificate_key.exists():
        host = config.serve.address.rpartition(":")[0].strip("[]")
        certificate, key = new_certificate(host)
        private_folder(run.certificate.parent)
        publish(run.certificate, certificate)
        publish(run.certificate_key, key)
    known, settings = read_credentials(run.credentials), _digest(run_settings(config))
    new = [site for site in config.serve.sites if site not in known]
    changed = [s for s, c in known.items() if not c.revoked and c.settings != settings]
    return [invite(run, config, site) for site in [*new, *changed]]


def put_wheel(run: RunDir) -> Path:
    """Put what a site with another flwr-hpc installs beside the invitations."""
    path = run.invitations / NAME
    publish(path, build_wheel())
    return path


def invite(run: RunDir, config: Config, site: str) -> Path:
    """Write a site's invitation; one that it had before counts no more."""
    assert config.serve.address is not None
    check_site_name(site)
    private_folder(run.invitations)
    settings, missing = run_settings(config)
    keys, token = new_key_pair(), secrets.token_urlsafe(32)
    path = run.invitations / f"{site}.json"
    with files.lock(run.invitations):
        credentials = read_credentials(run.credentials)
        fresh = Credential(
            sha256(token), keys.public_pem, keys.public_ssh, settings=_digest((settings, missing))
        )
        invitation = Invitation(
            format=FORMAT,
            site=site,
            address=config.serve.address,
            certificate=run.certificate.read_text(),
            token=token,
            private_key=keys.private_ssh,
            run_key=run.key,
            sites=sorted({*credentials, *config.serve.sites, site}),
            versions=versions(),
            run=settings,
            missing=missing,
            strategy=dict(config.strategy),
        )
        write_credentials(run.credentials, {**credentials, site: fresh})
        invitation.write(path)
    return path


def private_key(run: RunDir, site: str) -> Path:
    """Write the key of a site that is on this machine, for its SuperNode; return the file."""
    path = run.invitations / f"{site}.pem"
    publish(path, read_invitation(run.invitations / f"{site}.json").private_key)
    return path


def serve_by_ssh(config: Config) -> None:
    """Let the server be reached through ports that SSH forwards: on this host alone."""
    if config.by_ssh:
        if config.ssh_config:  # a resume may be typed elsewhere
            config.ssh_config = str(Path(config.ssh_config).expanduser().absolute())
        before = config.serve.listen if config.resume else None
        address = f"127.0.0.1:{_free_port(before)}"
        config.serve = ServeConfig(address, address, list(config.facilities))


def revoke(run: RunDir, site: str) -> Credential:
    """Let a site in no more; return what it had."""
    with files.lock(run.invitations):
        credentials = read_credentials(run.credentials)
        if site not in credentials:
            known = ", ".join(credentials) or "none"
            hint = closest(site, credentials)
            raise UserError(f"no site '{site}' was invited.{hint} Invited: {known}.")
        credential = credentials[site]
        write_credentials(run.credentials, {**credentials, site: replace(credential, revoked=True)})
    (run.invitations / f"{site}.json").unlink(missing_ok=True)
    return credential


def register(run: RunDir, command: Runner, *, anew: bool) -> None:
    """Make the sites' SuperNodes known to the SuperLink that runs.

    Parameters
    ----------
    run : RunDir
    command : callable
        Runs Flower's command.
    anew : bool
        Also those that have a number: it was another SuperLink's.
    """
    from flwr_hpc.exchange.http_server.uploads import adopt  # with a web framework

    for site, credential in read_credentials(run.credentials).items():
        if credential.revoked or (credential.node_id and not anew):
            continue
        key = run.flower / f"{site}.pub"
        publish(key, credential.public_ssh)
        node_id = _node_id(command(commands.register_node(key, site)))
        if credential.node_id:
            adopt(run.exchange, node_folder(credential.node_id), node_folder(node_id))
        with files.lock(run.invitations):
            now = read_credentials(run.credentials)
            if now[site].public_key == credential.public_key:
                write_credentials(
                    run.credentials, {**now, site: replace(now[site], node_id=node_id)}
                )


def unregister(run: RunDir, node_id: int) -> None:
    """Let SuperLink forget a SuperNode; the gate keeps it out already."""
    run_flower(run)(commands.unregister_node(node_id))


def run_flower(run: RunDir) -> Runner:
    """Return what runs Flower's command against this run's SuperLink, from another process."""
    env = {**os.environ, **commands.environment(run.flower)}

    def runner(command: Sequence[str]) -> str:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
        if done.returncode:
            raise UserError(f"{' '.join(command)}: {done.stdout}{done.stderr}".strip())
        return done.stdout

    return runner


def _digest(settings: tuple[dict[str, Any], list[str]]) -> str:
    return sha256(json.dumps(settings, sort_keys=True, default=str))


def _free_port(before: str | None) -> int:
    """Return a port of this host's: that of before, if nobody has it now."""
    for port in (int((before or "").rpartition(":")[2] or 0), 0):
        with socket.socket() as s, suppress(OSError):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("127.0.0.1", port))
            return int(s.getsockname()[1])
    raise UserError("this host has no free port on 127.0.0.1")


def _node_id(text: str) -> int:
    """Return the number in what ``flwr supernode register --format=json`` prints."""
    start = text.find("{")
    answer = json.loads(text[start : text.rfind("}") + 1]) if start >= 0 else {}
    if not answer.get("node-id"):
        raise RuntimeError(f"Flower did not register a SuperNode: {text.strip()}")
    return int(answer["node-id"])
