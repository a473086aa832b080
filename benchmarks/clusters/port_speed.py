"""A file through a served run's own port against `scp` of the same file, in turns.

Hosts that share nothing (`tests/lab/centres.py`; needs root and /dev/net/tun). `flwr_hpc.serve`
runs at one of them; a site's person moves the file with the invitation's credential through the
gate, as a SuperNode does: on the server's own host (loopback), and over a line that is throttled.

    python benchmarks/clusters/port_speed.py [--mb N]

Both encrypt; ours also hashes what arrives, and the server syncs it. Ends with 1 if a median takes
more than 1.3 times scp's. Writes ``benchmarks/results/port_speed.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from _machine import record
from lab.centres import CENTRES, Centres, let_in, missing_tun
from lab.host import missing
from lab.remote import Host
from worlds.runs.joined import Joined

from flwr_hpc.config.invitation import Invitation, read_invitation
from flwr_hpc.exchange.store import Reference
from flwr_hpc.exchange.stores.https import HttpsStore
from flwr_hpc.join import server_door

LIMIT = 1.3  # of scp's seconds
WAYS = ("to the server", "from the server")
# How each is set (None: the server's own host), and how often the file goes there and back.
LINES: dict[str, tuple[dict[str, float] | None, int]] = {
    "loopback": (None, 5),
    "100 Mbit/s, 80 ms": ({"rate_mbit": 100.0, "rtt_ms": 80.0}, 1),
}
PAYLOAD = "payload"  # in a home folder


def main() -> int:
    """Measure, print and record; 1 if a limit is broken."""
    options = _options()
    if options.move:
        return move(json.loads(options.move))
    if reason := missing() or missing_tun():
        print(f"skipped: {reason}")
        return 0
    found: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="port-speed-") as logs,
        Centres.up("port_speed", (CENTRES[0], CENTRES[2])) as centres,
    ):
        server, site = centres["server"], centres["centre_b"]
        joined = Joined(centres, Path(logs), "federation.wait_s=86400")
        joined.serve()
        joined.deliver()
        letter = f"/home/{site.user}/{site.name}.json"
        server.write(f"/home/{server.user}/{site.name}.json", site.outside(letter).read_text())
        let_in(server, server)
        for name, (line, times) in LINES.items():
            host = site if line else server
            if line:
                site.link.set(**line)
            digest = make(host, int(options.mb * 1e6))
            found[name] = compare(server, host, site.name, digest, times)
            print(name, found[name], flush=True)
            host.outside(f"/home/{host.user}/{PAYLOAD}").unlink()
    record("port_speed", {"lines": found}, {"mb": options.mb})
    return int(max(ratio for line in found.values() for ratio in line["ratio"].values()) > LIMIT)


def make(host: Host, size: int) -> str:
    """Write a file that does not compress; returns its sha256."""
    written = f"head -c {size} /dev/urandom | tee {PAYLOAD} | sha256sum"
    return host.run("sh", "-c", written).split()[0]


def compare(server: Host, host: Host, invited: str, digest: str, times: int) -> dict[str, Any]:
    """Move the file there and back by turns; returns each side's seconds, and their ratios."""
    seconds: dict[str, dict[str, list[float]]] = {
        side: {way: [] for way in WAYS} for side in ("port", "scp")
    }
    for _ in range(times):
        for way in WAYS:
            seconds["port"][way].append(by_port(host, invited, digest, way))
            seconds["scp"][way].append(by_scp(server, host, way))
    ratio = {
        way: round(median(seconds["port"][way]) / median(seconds["scp"][way]), 2) for way in WAYS
    }
    return {"seconds": seconds, "ratio": ratio}


def by_port(host: Host, invited: str, digest: str, way: str) -> float:
    """Return the seconds of a transfer, without its process's start."""
    what = {"invitation": f"{invited}.json", "digest": digest, "way": way}
    out = host.run(sys.executable, __file__, "--move", json.dumps(what), timeout_s=3600)
    return float(out)


def by_scp(server: Host, host: Host, way: str) -> float:
    """Copy as the server's person, whom every host lets in."""
    there, copy = f"{host.name}:{PAYLOAD}", "copied"
    if way == WAYS[0]:
        return timed(lambda: server.run("scp", "-q", there, copy, timeout_s=3600))
    took = timed(lambda: server.run("scp", "-q", copy, f"{host.name}:back", timeout_s=3600))
    for at, name in ((server, copy), (host, "back")):
        at.outside(f"/home/{at.user}/{name}").unlink()
    return took


def move(what: dict[str, str]) -> int:
    """Be a site: send the file, or fetch it and have the server forget it; print the seconds."""
    invitation = read_invitation(Path(what["invitation"]))
    payload, folder = Path(PAYLOAD), folder_of(invitation)
    ref = Reference.of(folder, what["digest"], payload.stat().st_size)
    with tempfile.TemporaryDirectory(dir=".") as own:
        credential = Path(own) / "credential"
        credential.touch(0o600)
        known = {"token": invitation.token, "certificate": invitation.certificate}
        credential.write_text(json.dumps(known))
        store = HttpsStore(f"https://{invitation.address}", credential)
        if what["way"] == WAYS[0]:
            print(timed(lambda: store.put(payload, folder, ref.sha256)))
        else:
            print(timed(lambda: store.get(ref, Path(own) / "back", own=True)))
            store.delete(ref)
    return 0


def folder_of(invitation: Invitation) -> str:
    """Return the site's folder at the server, as soon as that is up."""
    while True:
        with suppress(OSError):
            said = server_door.read(invitation, server_door.knock(invitation))
            if folder := said.get("folder"):
                return str(folder)
        time.sleep(0.5)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that something takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=1000)
    parser.add_argument("--move", help=argparse.SUPPRESS)  # this script's own processes
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
