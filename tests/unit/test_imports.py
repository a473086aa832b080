"""The direction of imports, and what login nodes must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Layer of each package or module of flwr_hpc; it imports from lower layers and from itself.
LAYERS = {
    "__init__": 9,  # the face: hands on `batch`
    "errors": 0,
    "protocol": 0,
    "files": 0,
    "clock": 0,
    "spool": 1,
    "config": 2,
    "gate": 5,  # its public socket serves the exchange
    "worker": 3,
    "schedulers": 4,
    "exchange": 4,
    "data": 4,
    "tracking": 4,
    "plan": 5,
    "site": 5,
    "ssh": 5,
    "train": 5,
    "flower": 6,
    "server": 7,
    "batch_mod": 8,
    "doctor": 10,  # looks at what join does
    "memorize": 8,
    "simulate": 8,
    "detached": 8,
    "sweep": 8,
    "report": 9,
    "join": 9,
    "run": 9,
    "serve": 10,
    "watch": 9,
}
REACH_STRATEGIES = ("server", "simulate")
# The last is what SuperNodes of other versions say over the wire, which stays as it is.
FLOWER_PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.proto.fleet_pb2")
LIGHT = [
    "flwr_hpc.run",
    "flwr_hpc.server.session",
    "flwr_hpc.batch_mod.mod",
    "flwr_hpc.report",
    "flwr_hpc.watch",
    "flwr_hpc.serve, flwr_hpc.server.invitations",
    "flwr_hpc.join.__main__, flwr_hpc.join.session",
    "flwr_hpc.plan.__main__",
    "flwr_hpc.memorize.__main__",
    "flwr_hpc.doctor.__main__",
    "flwr_hpc.doctor.probe",
    "flwr_hpc.site.client_app",
    "flwr_hpc.gate.__main__, flwr_hpc.gate.door",
    "flwr_hpc.server.server_app",
    ", ".join(
        f"flwr_hpc.worker.{p.stem}" for p in (ROOT / "flwr_hpc" / "worker").glob("[a-z]*.py")
    ),
    "flwr_hpc.exchange.client",
    "flwr_hpc.data.sources",
]


def _sources() -> list[Path]:
    return sorted([*(ROOT / "flwr_hpc").rglob("*.py"), *(ROOT / "strategies").rglob("*.py")])


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    """Protects the layering: lower layers and siblings never reach up or across."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for module in _imports(path):
        if parts[0] == "strategies":
            if module.startswith("flwr_hpc"):
                assert module.startswith("flwr_hpc.protocol"), f"strategies import {module}"
            continue
        if module.startswith("strategies"):
            assert parts[1] in REACH_STRATEGIES, f"{path} reaches strategies other than by _target_"
        if not module.startswith("flwr_hpc."):
            continue
        here, there = _part(".".join(parts)), _part(module)
        if there == here or module in ("flwr_hpc.__version__", "flwr_hpc.batch"):
            continue
        assert LAYERS[there] < LAYERS[here], f"{path}: {module}"


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_flowers_public_api(path: Path) -> None:
    """Protects against Flower's monthly changes of its private modules."""
    for module in _imports(path):
        if module == "flwr" or module.startswith("flwr."):
            assert module.startswith(FLOWER_PUBLIC), f"{path}: {module}"


@pytest.mark.parametrize("module", LIGHT)
def test_login_node_loads_neither_torch_nor_wandb(module: str) -> None:
    """Protects login nodes' memory and the commands' answer time."""
    code = f"import sys, {module}; print([m for m in ('torch', 'wandb') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert out.stdout.strip() == "[]"
