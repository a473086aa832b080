"""What sets the families of transformers apart, as far as counting parameters needs it."""

from __future__ import annotations

from dataclasses import dataclass

from flwr_hpc.errors import UserError


@dataclass(frozen=True)
class Family:
    """A ``model_type`` of transformers; the defaults are Llama's."""

    layer_norm: bool = False  # LayerNorm (weight and bias) in place of RMSNorm (weight)
    block_norms: int = 2  # Norms of a decoder layer
    query_key_norm: bool = False  # RMSNorm of each head's queries and keys
    qkv_bias: bool = False
    fused_qkv: bool = False  # Queries, keys and values are one module
    out_bias: bool = False  # Of the attention's last projection
    mlp_bias: bool = False
    gated: bool = True  # The MLP has a gate beside its up projection
    # How many arrays of the MLP's width autograd keeps for the backward pass: what an activation
    # function made of single operations (``gelu_new``) keeps is more than a fused one does.
    mlp_saved: int = 4
    float32_norms: bool = False  # The norm keeps its normalised values in float32, too
    fused_saved: bool = False  # Values are kept together with the queries and keys beside them
    # Attention as single operations, which keeps all pairs of positions: transformers has no
    # fused one for the family (soft caps, position biases).
    eager: bool = False
    learned_positions: bool = False
    tied: bool = False  # The head is the embedding, unless the configuration says otherwise
    experts: bool = False
    # transformers' defaults where they do not follow from the other sizes.
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate: int | None = None  # Multiple of the hidden size


_T5 = Family(gated=False, mlp_saved=1, eager=True, head_dim=64)
FAMILIES = {
    "gemma": Family(tied=True, head_dim=256, float32_norms=True),
    "gemma2": Family(tied=True, head_dim=256, block_norms=4, float32_norms=True, eager=True),
    "gpt2": Family(
        layer_norm=True, qkv_bias=True, fused_qkv=True, out_bias=True, mlp_bias=True, gated=False,
        mlp_saved=5, learned_positions=True, tied=True, intermediate=4,
    ),
    "gpt_neox": Family(
        layer_norm=True, qkv_bias=True, fused_qkv=True, out_bias=True, mlp_bias=True, gated=False,
        mlp_saved=2, fused_saved=True,
    ),
    "llama": Family(),
    "mistral": Family(kv_heads=8),
    "mixtral": Family(kv_heads=8, experts=True),
    "mt5": _T5,
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(query_key_norm=True, head_dim=128),
    "t5": _T5,
}  # fmt: skip


def family(model_type: str) -> Family:
    """Return a family by its ``model_type``."""
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type={model_type} cannot be planned: its shape is not known here. "
            f"Known: {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
