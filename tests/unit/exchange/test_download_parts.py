"""What interrupted downloads leave in a site's folder."""

from __future__ import annotations

import os

from flwr_hpc.exchange.resumable import download

NOW = 1e9


def test_only_what_nobody_comes_back_to_is_removed(tmp_path):
    """A week old, or older than the last few; with its marks, and no other file."""
    (tmp_path / "weights.safetensors").touch()
    ages = [3600.0 * i for i in range(download.COUNT + 2)]
    for i, age in enumerate(ages):
        for suffix in (download.PART, download.MARKS):
            path = tmp_path / f".{i:064}{suffix}"
            path.touch()
            os.utime(path, (NOW - age, NOW - age))
    os.utime(tmp_path / f".{0:064}{download.PART}", (NOW - 8 * 86400, NOW - 8 * 86400))
    download.sweep(tmp_path, NOW)
    kept = range(1, download.COUNT + 1)
    names = {f".{i:064}{suffix}" for i in kept for suffix in (download.PART, download.MARKS)}
    assert {p.name for p in tmp_path.iterdir()} == {*names, "weights.safetensors"}
    download.sweep(tmp_path / "nothing", NOW)
