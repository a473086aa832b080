"""A ClientApp behind `flwr_hpc.batch` in a folder of its own, and messages for it."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from worlds.jobs import processes_of
from worlds.strategies.grid import name_this_process

PYPROJECT = """
[project]
name = "demo"
version = "1"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
clientapp = "{module}.client_app:app"
"""
HEAD = """
import os, signal, sys, time
from flwr.app import ArrayRecord, Array, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
import flwr_hpc

"""
_numbers = itertools.count()


def make_app(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Write an app as Flower lays it out, and import its client module."""
    module = f"batch_app_{next(_numbers)}"
    folder = tmp_path / "the app"
    (folder / module).mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT.format(module=module))
    (folder / module / "__init__.py").write_text("")
    (folder / module / "client_app.py").write_text(HEAD + source)
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(f"{module}.client_app")


def make_message(kind: str = "train", **config: object) -> Message:
    """Return a message with a record of every kind."""
    name_this_process()
    arrays = {"w": Array(np.arange(6, dtype=np.float32).reshape(2, 3)), "b": Array(np.array(7))}
    content = RecordDict(
        {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord({"i": 1, "f": 0.1, "many": [1.5, float("inf")]}),
            "config": ConfigRecord({"s": "ü", "b": b"\0\xff", "t": True, "l": ["a", "b"]}),
        }
    )
    content["options"] = ConfigRecord(config)  # type: ignore[arg-type]
    message = Message(content, dst_node_id=7, message_type=kind, group_id="3", ttl=1000.0)
    message.metadata.__dict__["_message_id"] = f"message-{next(_numbers)}"
    return message


def make_context(**node_config: object) -> Context:
    state = RecordDict({"kept": MetricRecord({"n": 1})})
    return Context(11, 7, dict(node_config), state, {"lr": 0.5})  # type: ignore[arg-type]


class Node:
    """A node whose ClientApp is called as Flower would."""

    def __init__(self, module: ModuleType, workdir: Path, **config: object) -> None:
        self.module, self.workdir = module, workdir
        self.context: Context = make_context(**{"flwr-hpc.workdir": str(workdir), **config})

    def send(self, kind: str = "train", **options: object) -> Message:
        reply: Message = self.module.app(make_message(kind, **options), self.context)
        return reply

    def about(self, **options: object) -> Any:
        return self.send(**options).content["about"]

    def processes(self) -> list[psutil.Process]:
        """Return the living processes of the node's jobs."""
        files = self.workdir.glob("flwr-hpc-batch/*/*/*/allocations/*/job.json")
        names = [json.loads(file.read_text())["name"] for file in files]
        return [process for name in names for process in processes_of(name)]
