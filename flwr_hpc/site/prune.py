"""Old orders and weights are deleted: a model's size times the rounds would fill any disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from flwr_hpc.spool import OrderDir, Spool


def prune(spool: Spool, keep: int = 4) -> None:
    """Delete all finished orders but the last `keep`, and weights that no order needs.

    Among the weights the newest `keep` stay too: their order may not be written yet.
    """
    orders = _newest_first((spool.root / "orders").glob("*/order.json"))
    finished = [p.parent for p in orders if (p.parent / "result.json").exists()]
    for folder in finished[keep:]:
        for alloc in spool.allocations():  # a requeued job reads its inbox again
            (alloc.path / "inbox" / folder.name).unlink(missing_ok=True)
        (folder / "order.json").unlink()  # first: what has none is no order any more
        shutil.rmtree(folder, ignore_errors=True)
    left = [OrderDir(p.parent) for p in orders if p.exists()]
    needed = {path for o in left for path in (o.order()[1], *o.further().values())}
    for weights in _newest_first((spool.root / "weights").glob("*.safetensors"))[keep:]:
        if weights not in needed:
            weights.unlink(missing_ok=True)


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda p: p.stat().st_mtime_ns, reverse=True)
