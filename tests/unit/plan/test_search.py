"""What the model of time and memory says of one plan against another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flwr_hpc.plan.bandwidth import Bandwidths
from flwr_hpc.plan.machine import Machine
from flwr_hpc.plan.memory import memory
from flwr_hpc.plan.parallel import ParallelPlan
from flwr_hpc.plan.search import global_batch, plans
from flwr_hpc.plan.shape import model_shape
from flwr_hpc.plan.step import step_time

SHAPE = model_shape({
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
})  # fmt: skip
MACHINE = Machine(4, 4, 312e12, 58e9, 400, Bandwidths(4, 300, 100))
PLAN = ParallelPlan(1, 16, 1, 2, 4, "none")


def test_compute_is_flops_over_the_rate() -> None:
    """Protects the unit: 6 N tokens and attention's causal half, at half of 312 TFLOP/s."""
    time = step_time(SHAPE, PLAN, 4096, MACHINE)
    tokens = 2 * 4 * 4096
    flops = tokens * (6 * SHAPE.multiplied + 6 * 32 * 4096 * 4096)
    # The head runs twice forward where its logits are taken in chunks.
    flops += tokens * 2 * 128256 * 4096
    assert time.compute == pytest.approx(flops / 156e12)


def test_recomputing_trades_time_for_memory() -> None:
    """Protects the trade: full costs a third more of the layers, and keeps their inputs alone."""
    full = replace(PLAN, checkpointing="full")
    some = replace(PLAN, checkpointing="selective")
    kept = [memory(SHAPE, p, 4096, 2).activations for p in (full, some, PLAN)]
    assert kept == sorted(kept)
    assert kept[0] < kept[2] / 10
    slower = step_time(SHAPE, full, 4096, MACHINE).compute
    assert 1.25 < slower / step_time(SHAPE, PLAN, 4096, MACHINE).compute < 1.34


def test_below_an_adapter_little_is_trained() -> None:
    """Protects the fit of LoRA and QLoRA: frozen weights have no gradient and no moments.

    By hand: per layer of 8B rank 8 is 8 x (inputs + outputs) of queries, keys, values, the last
    of attention, and three MLP matrices.
    """
    lora = replace(SHAPE, adapter_rank=8)
    packed = replace(lora, packed=True)
    attention = (4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096)
    assert lora.adapters == 32 * 8 * (attention + 3 * (4096 + 14336)) == 20_971_520
    whole, some, four_bits = (memory(s, PLAN, 4096, 2) for s in (SHAPE, lora, packed))
    assert whole.optimizer == 2 * whole.parameters
    assert some.optimizer == 8 * lora.adapters / 16
    assert some.parameters == 4 * (lora.parameters + lora.adapters) / 16
    matrices = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    rest = lora.parameters - matrices + lora.adapters
    assert four_bits.parameters == pytest.approx(4 * rest / 16 + 0.515869 * matrices)
    alone = replace(PLAN, shard=1, micro_batch=1)
    assert memory(packed, alone, 4096, 2).parameters < 9e9 < memory(lora, alone, 4096, 2).parameters


def test_an_adapter_makes_steps_shorter() -> None:
    """Protects LoRA's time: 4 N and not 6 N; packed weights are gathered from nobody."""
    slow = replace(MACHINE, bandwidths=Bandwidths(4, 300, 1), overlap=0.0)
    lora = replace(SHAPE, adapter_rank=8)
    whole, some, packed = (
        step_time(s, PLAN, 4096, slow) for s in (SHAPE, lora, replace(lora, packed=True))
    )
    tokens = 2 * 4 * 4096
    flops = tokens * (4 * SHAPE.multiplied + 6 * lora.adapters + 6 * 32 * 4096 * 4096)
    flops += tokens * 2 * 128256 * 4096  # the head once more
    assert some.compute == pytest.approx(flops / 156e12)
    assert lora.flops_per_token(4096) < 0.75 * SHAPE.flops_per_token(4096)
    assert some.shard == pytest.approx(whole.shard / 2, rel=0.1)  # no gradients are scattered
    assert packed.shard < 0.2 * some.shard  # of the head, and of adapters
    assert some.optimizer < whole.optimizer / 4  # most of it the step itself


def test_a_slow_network_shows() -> None:
    """Protects the choice of a mesh: what computing cannot hide is counted, and no more."""
    slow = replace(MACHINE, bandwidths=Bandwidths(4, 300, 5))
    assert step_time(SHAPE, PLAN, 4096, MACHINE).shard == 0
    exposed = step_time(SHAPE, PLAN, 4096, slow).shard
    # 8 bytes per parameter pass through each rank of 16 per micro batch, at 4 GB/s.
    sent = 4 * SHAPE.parameters * 8 * 15 / 16 / 4e9
    hidden = 0.8 * step_time(SHAPE, PLAN, 4096, slow).compute
    assert exposed == pytest.approx(sent - hidden, rel=0.1)


def test_every_plan_works_on_the_whole_batch() -> None:
    """Protects training: a plan changes how a step is computed, never what it computes."""
    found = list(plans(SHAPE, MACHINE, 256))
    assert {p.sequences for p in found} == {256}
    assert len(found) == len(set(found))
    assert {p.tensor for p in found} == {1, 2, 4}
    assert {(p.replicate, p.shard) for p in found if p.tensor == 4} == {(4, 1), (2, 2), (1, 4)}


@pytest.mark.parametrize(("tokens", "expected"), [(2**20, 256), (1, 16), (3 * 2**19, 512)])
def test_batch_is_what_the_ranks_can_share(tokens: int, expected: int) -> None:
    """Protects from batches that leave ranks without work."""
    assert global_batch(tokens, 4096, 16) == expected
