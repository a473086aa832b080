"""What makes steps fast: batches made ahead, collections between steps, a compiler."""

from __future__ import annotations

import functools
import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds.train.torch_ranks import tiny_model

from flwr_hpc.config.schema import TrainConfig
from flwr_hpc.data.batches import Batch
from flwr_hpc.errors import UserError
from flwr_hpc.train.parallel import sharding
from flwr_hpc.train.runtime import compiling, device, garbage
from flwr_hpc.train.runtime.prefetch import Prefetch
from flwr_hpc.train.worker import GPU_ALLOCATOR, _prepare_environment


def _batch(first: int) -> Batch:
    ids = torch.tensor([[first]])
    return Batch(ids, ids)


def test_the_next_batch_is_made_beside_the_step() -> None:
    """In another thread, and by its place alone: also after the cursor was moved."""
    made: list[tuple[int, str]] = []

    def make(first: int) -> Batch:
        made.append((first, threading.current_thread().name.partition("_")[0]))
        return _batch(first)

    batches = Prefetch(make)
    places = [0, 4, 8, 20, 24, 24]  # 12 was begun in vain; 24 is asked for again
    found = [int(batches.get(first, then=first + 4).input_ids) for first in places]
    assert found == places
    here = threading.current_thread().name
    assert [m for m in made if m[0] in (0, 4, 8)] == [(0, here), (4, "batches"), (8, "batches")]


def test_a_failure_of_the_reader_ends_the_step_that_needs_it() -> None:
    """And none before: a batch begun in vain is nobody's."""

    def make(first: int) -> Batch:
        if first == 4:
            raise OSError("no such file")
        return _batch(first)

    batches = Prefetch(make)
    assert int(batches.get(0, then=4).input_ids) == 0
    with pytest.raises(OSError, match="no such file"):
        batches.get(4, then=8)
    assert int(batches.get(8, then=12).input_ids) == 8


def test_garbage_is_collected_at_the_same_steps_everywhere() -> None:
    """What a step leaves in a circle lives until the step that all ranks collect at."""

    class Node:
        alive = 0

        def __init__(self) -> None:
            self.itself = self
            Node.alive += 1

        def __del__(self) -> None:
            Node.alive -= 1

    alive = []
    with garbage.uncollected():
        for step in range(1, 2 * garbage.EVERY_STEPS + 1):
            for _ in range(100):  # far more than the collector's own threshold, all together
                Node()
            garbage.collect_at(step)
            alive.append(Node.alive)
    period = [100 * n for n in range(1, garbage.EVERY_STEPS)] + [0]
    assert alive == period * 2
    assert gc.isenabled()


def test_a_job_without_a_compiler_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything is loaded, with what to do; not as a traceback at the first step."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-such-compiler"),))
    with pytest.raises(UserError, match=r"does not work in the job.*CXX=.*train\.compile=false"):
        compiling.check_compiler(torch.device("cpu"))


def test_layers_of_many_kinds_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects training from staying eager where evaluation, which comes first, took all places."""

    class Layer(torch.nn.Module):
        def __init__(self, kind: int) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() * (self.kind if self.training else -self.kind)

    runs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *inputs: runs.append(1) or graph.forward(*inputs)

    compile = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("torch._dynamo.config.recompile_limit", 8)
    layers: list[torch.nn.Module] = [Layer(kind) for kind in range(6)]
    compiling.compile_layers(layers)
    for training in (False, True, True):
        runs.clear()
        for layer in layers:
            layer.train(training)(torch.ones(2))
        assert len(runs) == len(layers)


@pytest.mark.parametrize("name", [None, *GPU_ALLOCATOR])
def test_gpu_memory_grows_in_segments_unless_the_user_set_it_up(
    monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    """By any of the names that torch reads, old and new."""
    environ = {name: "max_split_size_mb:64"} if name else {}
    monkeypatch.setattr(os, "environ", environ)
    settings: Any = type("Settings", (), {"internet": True})
    _prepare_environment(settings)
    found = {each: environ[each] for each in GPU_ALLOCATOR if each in environ}
    default = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert found == ({name: "max_split_size_mb:64"} if name else default)


def test_gpus_are_fed_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects GPUs from waiting for copies, and CPUs from memory that only GPUs can pin."""
    policies: list[Any] = []
    monkeypatch.setattr(
        sharding, "fully_shard", lambda _, **given: policies.append(given.get("offload_policy"))
    )
    over = sharding.Meshes(None, None, None)  # type: ignore[arg-type]
    for kind, offload in (("cuda", True), ("cpu", True), ("cuda", False)):
        sharding.shard(tiny_model().model, over, torch.device(kind), "bf16", cpu_offload=offload)
    assert [getattr(policy, "pin_memory", None) for policy in policies] == [True, False, None]


@pytest.mark.parametrize(("tf32", "expected"), [(True, "high"), (False, "highest")])
def test_tf32_is_for_gpus(tf32: bool, expected: str) -> None:
    """On a CPU the same word of torch would mean bf16 in some products."""
    before = torch.get_float32_matmul_precision()
    try:
        device.set_product_precision(TrainConfig(tf32=tf32), torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == before
        device.set_product_precision(TrainConfig(tf32=tf32), torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)
