"""What a codec saves where the line is slow: the same training over 20 Mbit/s and 80 ms.

Hosts that share nothing (`tests/lab/centres.py`; needs root and /dev/net/tun): a server and two
centres, joined over a wide-area link that is throttled. Each codec trains the same model for as
many rounds, one after the other on one machine.

    python benchmarks/clusters/slow_link.py [rounds]

Writes ``benchmarks/results/slow_link.json``: of the time from the first order to the last version
the share in which weights were on the line (of the slower site), and the time to the loss that all
codecs reach.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from _machine import record
from lab.centres import Centres, missing_tun
from lab.host import missing
from worlds.runs.joined import Joined

LINE = {"rate_mbit": 20.0, "rtt_ms": 80.0}
# Of both ways, and of versions on their way to the sites.
CODECS = {
    "full": ("exchange.codec=full", "exchange.downlink=full"),
    "bf16": ("exchange.codec=bf16", "exchange.downlink=full"),
    "int8": ("exchange.codec=int8", "exchange.downlink=int8"),
    "int4": ("exchange.codec=int4", "exchange.downlink=int8"),
    "topk+int2": ("exchange.codec=[topk,int2]", "exchange.downlink=int8"),
}
SHAPE = ("hidden_size=384", "intermediate_size=1536", "num_attention_heads=4")
SETTINGS = (
    *(f"model.config.{value}" for value in (*SHAPE, "num_key_value_heads=4")),
    "train.steps=20", "strategy=diloco", "federation.wait_s=10",
)  # fmt: skip


def train(name: str, codec: tuple[str, ...], rounds: int, logs: Path) -> dict[str, Any]:
    """Train over the line; return versions with their loss and time, and what was on the line."""
    logs.mkdir()
    with Centres.up(name) as centres:
        joined = Joined(centres, logs, *SETTINGS, *codec, f"rounds={rounds}")
        for site in joined.sites:
            site.link.set(**LINE)
        joined.begin()
        for process in list(joined.commands.values()):
            joined.until(lambda process=process: process.poll() is not None)  # type: ignore[misc]
            assert process.returncode == 0, joined.said()
        return figures(joined)


def figures(joined: Joined) -> dict[str, Any]:
    """Return what the run's events say."""
    sent = [e for e in joined.events("order_sent") if e["kind"] == "train"]
    began = min(event["t"] for event in sent)
    made = {0: 0.0} | {e["version"]: e["t"] - began for e in joined.events("aggregated")}
    losses: dict[int, list[float]] = {}
    for event in joined.events("evaluated"):
        losses.setdefault(event["version"], []).append(event["held_out_loss"])
    moved: dict[str, dict[tuple[str, str, float], dict[str, Any]]] = {}
    for event in joined.events("transfer"):
        if event["t"] >= began:
            key = event["way"], event["payload"], event["total"]
            moved.setdefault(event["facility"], {})[key] = event
    seconds = {site: sum(e["seconds"] for e in found.values()) for site, found in moved.items()}
    slowest = max(seconds, key=lambda site: seconds[site])
    whole = max(made.values())
    return {
        "seconds": round(whole, 1),
        "transfer_seconds": round(seconds[slowest], 1),
        "transfer_share": round(seconds[slowest] / whole, 3),
        "mb": {
            way: round(sum(e["total"] for e in moved[slowest].values() if e["way"] == way) / 1e6, 3)
            for way in ("to_site", "from_site")
        },
        "versions": [
            (v, round(made[v], 1), round(mean(losses[v]), 4)) for v in sorted(made) if v in losses
        ],
    }


def main(rounds: int) -> None:
    """Run, print and record."""
    if reason := missing() or missing_tun():
        print(f"skipped: {reason}")
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="slow-link-") as folder:
        for number, (name, codec) in enumerate(CODECS.items()):
            found[name] = train(f"slow{number}", codec, rounds, Path(folder) / name)
            print(name, found[name], flush=True)
    common = max(min(loss for _, _, loss in run["versions"]) for run in found.values())
    for run in found.values():
        run["seconds_to_common_loss"] = min(t for _, t, loss in run["versions"] if loss <= common)
    print({name: run["seconds_to_common_loss"] for name, run in found.items()}, common)
    record(
        "slow_link", {"common_loss": common, "codecs": found},
        {"line": LINE, "rounds": rounds, "settings": SETTINGS},
    )  # fmt: skip


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]), *(8,)[len(sys.argv) - 1 :])
