"""What only a GPU or a cluster shows, with what torch 2.13 says there put in its place.

Tried on no such machine.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flwr_hpc.config.schema import LoraConfig, ModelConfig
from flwr_hpc.errors import UserError
from flwr_hpc.train.load import _check_device
from flwr_hpc.train.parallel.sharding import precision_policy
from flwr_hpc.train.rendezvous import Failure, interfaces
from flwr_hpc.train.runtime.device import backends, choose_device
from flwr_hpc.worker.ranks import Ranks

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("kind", "backend"), [("cuda", "cpu:gloo,cuda:nccl"), ("xpu", "cpu:gloo,xpu:xccl")]
)
def test_ranks_take_the_gpus_there_are_in_turn(
    monkeypatch: pytest.MonkeyPatch, kind: str, backend: str
) -> None:
    """NVIDIA's and AMD's (cuda), Intel's (xpu), each with its own collectives beside the host's."""
    taken: list[Any] = []
    devices = torch.get_device_module(kind)
    monkeypatch.setattr(devices, "is_available", lambda: True)
    monkeypatch.setattr(devices, "device_count", lambda: 4)
    monkeypatch.setattr(devices, "set_device", taken.append)
    for local_rank in (0, 3, 5):
        assert backends(choose_device(Ranks(local_rank, 8, local_rank, 8))) == backend
    assert taken == [torch.device(kind, index) for index in (0, 3, 1)]


def test_without_a_gpu_ranks_take_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And talk by gloo alone."""
    for devices in (torch.cuda, torch.xpu):
        monkeypatch.setattr(devices, "is_available", lambda: False)
    assert backends(choose_device(Ranks())) == "gloo"


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, None)])
def test_bf16_only_where_the_device_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, dtype: Any
) -> None:
    """A V100 emulates bf16, slower than fp32; torch says yes unless asked to leave that out."""
    supported = lambda including_emulation=True: including_emulation or native  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision_policy("auto", CUDA).param_dtype == dtype
    assert precision_policy("bf16", CUDA).param_dtype == torch.bfloat16  # who asks for it gets it


def test_4_bits_on_a_cpu_are_refused() -> None:
    """Protects from a job whose GPUs torch does not see, and which would crawl."""
    model = ModelConfig(path="m", lora=LoraConfig(r=8, quantize="nf4"))
    settings: Any = SimpleNamespace(model=model, facility="a", gpus_per_node=4)
    with pytest.raises(UserError, match=r"sees none in the job of a\. Give model\.lora\.quantize"):
        _check_device(settings, torch.device("cpu"))
    _check_device(settings, CUDA)


def test_out_of_memory_is_not_tried_again() -> None:
    """The same order would need the same memory at every try; the words say what to lower."""
    said = "CUDA out of memory. Tried to allocate 15.66 GiB. GPU 0 has a total capacity of 79.1 GiB"
    failure = Failure.of(torch.OutOfMemoryError(said))
    assert failure.fatal
    assert "CUDA out of memory" in failure.message
    assert "train.micro_batch" in failure.message


HERE = ["lo", "docker0", "eth0", "eth01", "hsn0", "hsn1", "ib0"]


@pytest.mark.parametrize(
    ("nccl", "chosen"),
    [
        ("", []),
        ("ib0", ["ib0"]),
        ("hsn", ["hsn0", "hsn1"]),
        ("hsn0,hsn1,hsn2", ["hsn0", "hsn1"]),
        ("eth0", ["eth0"]),
        ("=eth", []),
        ("^eth,ib", ["hsn0", "hsn1"]),
    ],
)
def test_gloo_takes_the_interfaces_of_nccl(nccl: str, chosen: list[str]) -> None:
    """Control traffic goes where the facility says, and not where the host name points."""
    assert interfaces(nccl, HERE) == chosen
