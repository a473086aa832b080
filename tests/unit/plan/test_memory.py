"""What a plan needs of memory, against what the trainer was measured to hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.plan.machine import machine
from flwr_hpc.plan.memory import memory
from flwr_hpc.plan.parallel import ParallelPlan
from flwr_hpc.plan.shape import ModelShape, model_shape

SEQ_LEN = 128


def _llama(hidden: int, inner: int, layers: int, vocabulary: int) -> ModelShape:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return model_shape(
        {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 8,
         "vocab_size": vocabulary, "tie_word_embeddings": True, **sizes}
    )  # fmt: skip


ONE_UNIT = _llama(512, 1376, 4, 4096)  # 15 M parameters
LAYERWISE = _llama(640, 1728, 6, 4096)  # 32 M


@pytest.mark.parametrize(
    ("shape", "plan", "measured_mb"),
    [
        # One rank gathers nothing. Embedding's backward pass: the table's gradient comes twice.
        (ONE_UNIT, ParallelPlan(1, 1, 1, 1, 1, "none"), 257),
        (LAYERWISE, ParallelPlan(1, 1, 1, 1, 1, "none"), 543),
        # The first layer's: all gradients, and its activations.
        (ONE_UNIT, ParallelPlan(1, 1, 1, 8, 1, "full"), 292),
        (LAYERWISE, ParallelPlan(1, 1, 1, 4, 1, "full"), 549),
        # All activations, and no gradient yet.
        (LAYERWISE, ParallelPlan(1, 1, 1, 4, 1, "none"), 586),
        # Earlier gradients, and the array that was gathered beside what was copied out of it.
        (_llama(512, 1376, 6, 6144), ParallelPlan(1, 2, 1, 1, 2, "none"), 404),
        # The same without earlier gradients, and of activations next to nothing.
        (_llama(384, 1024, 4, 3072), ParallelPlan(1, 2, 1, 4, 1, "full"), 142),
        # The next layer on its way to a layer at work, the last one's gradients not let go of.
        (LAYERWISE, ParallelPlan(1, 2, 1, 2, 1, "none"), 380),
    ],
    ids=str,
)
def test_the_fullest_moment_is_foreseen(
    shape: ModelShape, plan: ParallelPlan, measured_mb: float
) -> None:
    """Protects plans from memory that runs out at a moment nobody counted (plan_quality.py)."""
    found = memory(shape, plan, SEQ_LEN, 4, gloo=True).total / 1e6
    assert found == pytest.approx(measured_mb, rel=0.05)


def test_what_is_offloaded_takes_no_memory_but_on_its_way() -> None:
    """Protects plans with train.cpu_offload: weights, gradients and moments are at the host."""
    plan = ParallelPlan(1, 2, 1, 64, 1, "none")  # fullest between forward and backward pass
    there, here = (memory(LAYERWISE, plan, SEQ_LEN, 2, offloaded=o) for o in (True, False))
    assert (there.parameters, there.gradients, there.optimizer) == (0, 0, 0)
    assert here.parameters == 4 * LAYERWISE.parameters / 2
    assert there.activations == here.activations
    (layer,) = (block.parameters for block in LAYERWISE.blocks)
    assert there.buffers == here.buffers + 3 * 4 * layer / 2
    lora = replace(LAYERWISE, adapter_rank=8)
    some, all_here = (memory(lora, plan, SEQ_LEN, 2, offloaded=o) for o in (True, False))
    assert some.total < all_here.total - all_here.parameters / 2
    facility = FacilityConfig(ranks_per_node=2, gpus_per_node=2)
    made, _ = machine(facility, 1, "bf16", 0.5, 0.8, offloaded=True)
    assert (made.offloaded, made.memory_gb_s) == (True, 10.0), "the CPU takes the step"


def test_only_ranks_without_gpus_pay_for_gloo() -> None:
    """Protects plans for GPUs, whose collectives need no copies."""
    plan = ParallelPlan(1, 2, 1, 2, 1, "none")
    with_copies, without = (memory(LAYERWISE, plan, SEQ_LEN, 4, g).total for g in (True, False))
    assert with_copies > without
    facility = FacilityConfig(ranks_per_node=2)
    cpus, _ = machine(facility, 1, "fp32", 0.5, 0.8)
    gpus, _ = machine(replace(facility, gpus_per_node=2), 1, "fp32", 0.5, 0.8)
    assert (cpus.gloo, gpus.gloo) == (True, False)
