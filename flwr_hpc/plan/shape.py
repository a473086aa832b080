"""A model's shape and parameter counts, by arithmetic on its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr_hpc.config.schema import LoraConfig
from flwr_hpc.config.validate import ENCODER_DECODERS, SIZES, UNSPLIT, size_key
from flwr_hpc.errors import UserError
from flwr_hpc.plan.families import Family, family

CAUSAL, ENCODER, DECODER = "causal", "encoder", "decoder"  # The last one writes behind an encoder


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sequence."""

    source: int  # That an encoder reads, or the only ones
    target: int  # That a decoder behind an encoder writes; else the same

    def of(self, block: Block, projection: Projection | None = None) -> int:
        """Return the tokens that a layer, or one of its projections, works on."""
        reads = projection is not None and projection.of_source
        return self.target if block.kind == DECODER and not reads else self.source

    def pairs(self, block: Block) -> float:
        """Return the positions that a token's attentions look at, of all and on average."""
        return (self.source + self.of(block)) / 2


@dataclass(frozen=True)
class Projection:
    """Matrices that read one input, e.g. queries, keys and values."""

    inputs: int
    outputs: int
    # The second of a pair, as attention's and the MLP's last: under tensor parallelism its inputs
    # are split and its outputs summed.
    reduces: bool = False
    biases: int = 0
    copies: int = 1  # Experts
    active: int = 1  # Of the copies, how many work on a token
    of_source: bool = False  # A decoder's that reads what the encoder has made
    matrices: int = 1  # Modules that share the outputs, each with an adapter of its own
    fused: bool = False  # They are one parameter, whose adapter peft gives the rank of all

    @property
    def weights(self) -> int:
        """Elements of one copy's matrices."""
        return self.inputs * self.outputs

    def adapter_b(self, rank: int) -> int:
        """Elements of LoRA's B on one copy's matrices."""
        return rank * (self.matrices if self.fused else 1) * self.outputs

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on one copy's matrices."""
        return rank * self.matrices * self.inputs + self.adapter_b(rank)


@dataclass(frozen=True)
class Block:
    """A layer, and how many of its kind there are."""

    count: int
    projections: tuple[Projection, ...]
    vectors: int  # Parameters besides the projections: norms
    attention_width: int  # Of queries, over all heads, and all attentions of the layer
    # Elements that autograd keeps per token for the backward pass, in the precision of computing
    # and in float32; and those of them that tensor parallelism splits.
    saved: int
    saved_float32: int
    saved_split: int
    # Likewise, in the precision of computing, where all but matrix products is recomputed.
    selective: int
    selective_split: int
    saved_pairs: int  # Bytes per token and position of the sequence
    kind: str = CAUSAL
    # Of a decoder, what is kept, and split, in the precision of computing per token of the encoder.
    saved_source: int = 0

    @property
    def parameters(self) -> int:
        """Of one such layer."""
        return self.vectors + sum(p.copies * (p.weights + p.biases) for p in self.projections)

    def attention_flops(self, lengths: Lengths) -> float:
        """Of the forward pass, per sequence; what looks back alone takes half of all pairs."""
        own, width = lengths.of(self), self.attention_width
        if self.kind == DECODER:  # half of the width is that of its second attention
            return width * own * (own + 2.0 * lengths.source)
        return width * own * own * (4.0 if self.kind == ENCODER else 2.0)

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA on one such layer's matrices."""
        return sum(p.copies * p.adapter(rank) for p in self.projections)


@dataclass(frozen=True)
class ModelShape:
    """A transformer as the performance model sees it."""

    model_type: str
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    blocks: tuple[Block, ...]
    tied: bool
    positions: int  # Rows of a learned table of positions
    vectors: int  # Parameters outside of blocks and tables: last norms
    longest: int | None  # Positions the model takes
    encoder_decoder: bool
    target_len: int | None = None  # What a decoder behind an encoder writes; None: as much
    adapter_rank: int = 0  # Of LoRA below which all this is frozen; 0: all is trained
    packed: bool = False  # The layers' frozen matrices are in 4 bit
    splits: bool = True  # Whether the trainer can split its layers over tensor ranks

    @property
    def layers(self) -> int:
        """Layers of all kinds."""
        return sum(b.count for b in self.blocks)

    @property
    def outside(self) -> int:
        """Parameters outside of the layers: embeddings, head, last norms."""
        tables = (1 if self.tied else 2) * self.vocabulary + self.positions
        return tables * self.hidden + self.vectors

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return self.outside + sum(b.count * b.parameters for b in self.blocks)

    @property
    def matrices(self) -> int:
        """Elements of the layers' matrices."""
        return sum(b.count * p.copies * p.weights for b in self.blocks for p in b.projections)

    @property
    def adapters(self) -> int:
        """Parameters of LoRA on all linear layers, ``target_modules=all-linear``."""
        return sum(b.count * b.adapters(self.adapter_rank) for b in self.blocks)

    @property
    def adapters_b(self) -> int:
        """Elements of their B alone."""
        rank = self.adapter_rank
        found = (b.count * p.copies * p.adapter_b(rank) for b in self.blocks for p in b.projections)
        return sum(found)

    @property
    def outputs(self) -> int:
        """Outputs of all linear layers, of which each has a magnitude with DoRA."""
        return sum(b.count * p.copies * p.outputs for b in self.blocks for p in b.projections)

    @property
    def trained(self) -> int:
        """Parameters that have gradients and moments."""
        return self.adapters if self.adapter_rank else self.parameters

    @property
    def multiplied(self) -> int:
        """Elements of matrices that a token is multiplied with: of experts only the active."""
        layers = sum(
            b.count * sum(p.active * p.weights for p in b.projections) for b in self.blocks
        )
        return layers + self.vocabulary * self.hidden

    def lengths(self, seq_len: int) -> Lengths:
        """Return the tokens of a sequence of `seq_len`, those that a decoder writes among them."""
        return Lengths(seq_len, self.target_len or seq_len)

    def flops_per_token(self, seq_len: int) -> float:
        """``6 N + 12 L d seq_len`` (PaLM, arXiv 2204.02311): what MFU is defined by.

        Of an encoder-decoder, per token that its encoder reads.
        """
        lengths = self.lengths(seq_len)
        factor = 4.0 if self.adapter_rank else 6.0  # frozen weights have no gradient
        flops = factor * self.vocabulary * self.hidden * lengths.target
        for block in self.blocks:
            products = sum(
                factor * lengths.of(block, p) * p.active * p.weights
                + 6.0 * lengths.of(block, p) * p.copies * p.adapter(self.adapter_rank)
                for p in block.projections
            )
            pairs = lengths.of(block) * lengths.pairs(block)
            flops += block.count * (products + 12.0 * block.attention_width * pairs)
        return flops / seq_len


def model_shape(config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
    """Return the shape of ``model.config``.

    Parameters
    ----------
    config : mapping
        As `transformers` takes it, ``model_type`` included.
    vocabulary : int or None
        Size of the tokenizer's, where the configuration gives none.
    """
    kind = config.get("model_type")
    if not kind:
        raise UserError("a plan needs the model's shape: model=NAME or model.config.model_type=...")
    sort = family(kind)
    if kind in ENCODER_DECODERS:
        return _encoder_decoder(config, sort, vocabulary)
    sizes = _Sizes.of(config, sort, kind)
    block = _decoder_layer(config, sort, sizes)
    vocab = config.get("vocab_size") or vocabulary
    if not vocab:
        raise UserError(f"model.config.vocab_size must be given to plan a {kind}")
    longest = _size(config, "max_position_embeddings")
    return ModelShape(
        kind, sizes.hidden, vocab, sizes.heads, sizes.kv_heads, (block,),
        tied=config.get("tie_word_embeddings", sort.tied),
        positions=(longest or 1024) if sort.learned_positions else 0,
        vectors=_norm(sort, sizes.hidden), longest=longest, encoder_decoder=False,
        splits=kind not in UNSPLIT,
    )  # fmt: skip


@dataclass(frozen=True)
class _Sizes:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any], sort: Family, kind: str) -> _Sizes:
        def needed(size: str) -> int:
            if (value := _size(config, size)) is None:
                names = " or ".join((size, *SIZES[size]))
                raise UserError(f"model.config of a {kind} lacks {names}: a plan needs it")
            return value

        hidden, heads = needed("hidden_size"), needed("num_attention_heads")
        inner = _size(config, "intermediate_size")
        if inner is None:
            inner = sort.intermediate * hidden if sort.intermediate else needed("intermediate_size")
        kv = config.get("num_key_value_heads") or sort.kv_heads or heads
        head = _size(config, "head_dim") or sort.head_dim or hidden // heads
        return cls(hidden, inner, needed("num_hidden_layers"), heads, kv, head)

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim


def _size(config: Mapping[str, Any], size: str) -> int | None:
    return config.get(size_key(config, size))


def _norm(sort: Family, width: int) -> int:
    return width * (2 if sort.layer_norm else 1)


def _decoder_layer(config: Mapping[str, Any], sort: Family, s: _Sizes) -> Block:
    copies = config.get("num_local_experts", 8) if sort.experts else 1
    active = config.get("num_experts_per_tok", 2) if sort.experts else 1
    projections = [*_attention(config, sort, s), *_mlp(config, sort, s, copies, active)]
    vectors = sort.block_norms * _norm(sort, s.hidden)
    vectors += 2 * s.head_dim if sort.query_key_norm else 0
    if sort.experts:
        projections.append(Projection(s.hidden, copies))  # the router
    return _block(sort, s, s.layers, tuple(projections), vectors, 1, active)


def _attention(config: Mapping[str, Any], sort: Family, s: _Sizes) -> list[Projection]:
    outputs = s.queries + 2 * s.keys
    qkv_bias = config.get("attention_bias", sort.qkv_bias)
    out_bias = config.get("attention_bias", sort.out_bias)
    return [
        Projection(
            s.hidden, outputs, biases=outputs if qkv_bias else 0,
            matrices=1 if sort.fused_qkv else 3,
        ),
        Projection(s.queries, s.hidden, reduces=True, biases=s.hidden if out_bias else 0),
    ]  # fmt: skip


def _mlp(
    config: Mapping[str, Any], sort: Family, s: _Sizes, copies: int = 1, active: int = 1
) -> list[Projection]:
    outputs = s.intermediate * (2 if sort.gated else 1)
    bias = config.get("mlp_bias", sort.mlp_bias)
    return [
        Projection(
            s.hidden, outputs, False, outputs if bias else 0, copies, active,
            matrices=2 if sort.gated else 1, fused=sort.experts,
        ),
        Projection(s.intermediate, s.hidden, True, s.hidden if bias else 0, copies, active),
    ]  # fmt: skip


def _block(
    sort: Family, s: _Sizes, count: int, projections: tuple[Projection, ...], vectors: int,
    attentions: int = 1, active: int = 1, kind: str = CAUSAL,
) -> Block:  # fmt: skip
    """Count what autograd keeps per token.

    A norm keeps its input (RMSNorm: in float32), the normalised values and its output; attention
    queries, keys, values and its output, and where it is no fused one the scores (a soft cap or a
    softmax each in float32 or twice in bf16); the MLP what its activation function needs.
    """
    norms = sort.block_norms + attentions - 1
    queries, keys, inner = s.queries * attentions, s.keys * attentions, s.intermediate * active
    normed = 1 if sort.float32_norms else 2
    float32 = 0 if sort.layer_norm else norms * s.hidden * (3 - normed)
    float32 += (queries + keys) if sort.query_key_norm else 0
    split = (4 if sort.fused_saved else 2) * queries + 2 * keys + sort.mlp_saved * inner
    split += (queries + keys) if sort.query_key_norm else 0
    routed = 2 * active * s.hidden if active > 1 else 0
    selective_split = 2 * queries + 2 * keys + inner * (2 if sort.gated else 1)
    source = 2 * s.keys if kind == DECODER else 0  # keys and values of what the encoder has made
    split, selective_split = split - source, selective_split - source
    return Block(
        count, projections, vectors, queries,
        saved=normed * norms * s.hidden + split + routed, saved_float32=float32,
        saved_split=split, selective=s.hidden * (2 + attentions) + selective_split,
        selective_split=selective_split,
        saved_pairs=8 * s.heads * attentions if sort.eager else 0, kind=kind, saved_source=source,
    )  # fmt: skip


def _encoder_decoder(config: Mapping[str, Any], sort: Family, vocabulary: int | None) -> ModelShape:
    """T5: an encoder and a decoder, whose layers attend to the encoder's output as well."""
    gated = "gated" in str(config.get("feed_forward_proj", "relu"))
    kind = str(config["model_type"])
    if kind == "mt5" and "feed_forward_proj" not in config:
        gated = True
    sort = replace(sort, gated=gated, mlp_saved=7 if gated else 1)
    s = _Sizes.of(config, sort, kind)
    own, mlp = _attention(config, sort, s), _mlp(config, sort, s)
    cross = [
        Projection(s.hidden, s.queries),
        Projection(s.hidden, 2 * s.keys, matrices=2, of_source=True),
        Projection(s.queries, s.hidden, reduces=True),
    ]  # fmt: skip
    decoders = config.get("num_decoder_layers") or s.layers
    biases = config.get("relative_attention_num_buckets", 32) * s.heads  # one table per stack
    blocks = (
        _block(sort, s, s.layers, (*own, *mlp), 2 * s.hidden, kind=ENCODER),
        _block(sort, s, decoders, (*own, *cross, *mlp), 3 * s.hidden, attentions=2, kind=DECODER),
    )
    vocab = config.get("vocab_size") or vocabulary
    if not vocab:
        raise UserError(f"model.config.vocab_size must be given to plan a {kind}")
    return ModelShape(
        kind, s.hidden, vocab, s.heads, s.kv_heads, blocks,
        tied=True, positions=0,  # by transformers, whatever the configuration says
        vectors=2 * s.hidden + 2 * biases, longest=None, encoder_decoder=True,
        splits=kind not in UNSPLIT,
    )  # fmt: skip


def adapter_parameters(shape: ModelShape, lora: LoraConfig) -> int:
    """Return how many parameters of an adapter of `shape` are trained, and travel."""
    if lora.freeze_a:
        return shape.adapters_b
    return shape.adapters + (shape.outputs if lora.dora else 0)


def tensor_degrees(shape: ModelShape, most: int) -> list[int]:
    """Return how many ways heads and MLPs can be split evenly, up to `most`."""
    inner = [p.inputs for block in shape.blocks for p in block.projections if p.reduces]
    common = math.gcd(shape.heads, shape.kv_heads, *inner)
    return [d for d in range(1, most + 1) if common % d == 0]
