"""What a site may keep at the server is what the run's settings say."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from flwr_hpc.config.compose import compose_config
from flwr_hpc.gate import __main__ as command
from flwr_hpc.gate.credentials import Credential, sha256, write_credentials
from flwr_hpc.server.driver import public_socket
from flwr_hpc.server.run_dir import RunDir

TOKEN, PATH = "lumi's token", "/v1/exchange/own"


async def _announce(app: Any, size: int) -> tuple[int, str]:
    """Ask for room for a payload, as a site does before it sends one."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"authorization": f"Bearer {TOKEN}", "content-range": f"bytes */{size}"}
    scope = {
        "type": "http",
        "method": "PUT",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent).decode()


@pytest.mark.parametrize(("quota", "most"), [((), 10**12), (("exchange.quota_gb=0.5",), 5 * 10**8)])
def test_a_payload_above_the_quota_is_refused(
    tmp_path: Path, quota: tuple[str, ...], most: int
) -> None:
    """Protects the server's disk from a site, and a large model from a limit nobody can change."""
    here = ("serve.address=train.example.org:8443", "serve.listen=127.0.0.1:0")
    run = RunDir(tmp_path)
    run = RunDir(tmp_path)
    (run.path / "run.json").write_text('{"run_key": "r1"}')
    run.credentials.parent.mkdir()
    write_credentials(run.credentials, {"lumi": Credential(sha256(TOKEN), "", "", node_id=7)})
    socket = public_socket(run, compose_config([*here, *quota]))
    assert socket is not None
    args = command._parser().parse_args([*socket.gate_options(), "flower-superlink"])
    outside = command._outside(args)
    assert outside is not None
    app = outside.wrap(lambda *_: pytest.fail("nothing of this is Flower's"))
    try:
        assert asyncio.run(_announce(app, most))[0] == 204
        status, reason = asyncio.run(_announce(app, most + 1))
    finally:
        outside.door.close()
    assert (status, "exchange.quota_gb" in reason) == (413, True)
