"""What each setting may be, and how settings go together. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from flwr_hpc.config import batch_size
from flwr_hpc.config.facility import walltime_s
from flwr_hpc.config.facility_shape import check_shape
from flwr_hpc.config.server_memory import ServerMemory
from flwr_hpc.errors import UserError, closest, not_negative, one_of, positive, within

NEXT_TOKEN, SPAN_CORRUPTION, SEQ2SEQ = OBJECTIVES = ("next_token", "span_corruption", "seq2seq")
RECORDS = ("jsonl", "parquet")  # Kinds of data that hold more than texts
CHOICES = {
    "data.kind": ("stdlib", "text", *RECORDS),
    "data.objective": OBJECTIVES,
    "allocation.policy": ("warm", "per_round"),
    "train.plan": ("none", "auto"),
    "train.loss": ("cross_entropy", "goldfish"),
    "train.precision": ("auto", "fp32", "bf16"),
    "train.activation_checkpointing": ("none", "selective", "full"),
    "model.lora.quantize": ("none", "nf4"),
    "tracking.mode": ("auto", "online", "offline", "disabled"),
}
POSITIVE = (
    *("rounds", "data.seq_len", "data.target_len", "data.held_out_sequences", "model.lora.alpha"),
    "model.max_shard_gb",
    *(f"train.{k}" for k in ("steps", "micro_batch", "accumulation", "lr", "eps")),
    *("train.replicate", "train.tensor", "train.batch_size", "train.schedule_steps"),
    *("allocation.idle_timeout_s", "federation.wait_s"),
    *("allocation.queue_deadline_s", "federation.acquire_deadline_s"),
    *(f"federation.{k}" for k in ("order_deadline_s", "round_deadline_s", "poll_s", "ttl_s")),
    *("federation.min_sites", "federation.max_failed_rounds", "exchange.stall_s"),
    "exchange.quota_gb",
    *("federation.update_norm_limit", "site.limits.node_hours", "site.limits.nodes"),
    *("site.limits.steps", "federation.clip_update_norm"),
)
NOT_NEGATIVE = (
    *("seed", "model.lora.r", "exchange.inline_below_mb", "allocation.retries"),
    *("allocation.max_successors", "allocation.progress_timeout_s"),
    *(
        f"train.{k}"
        for k in (
            "clip",
            "warmup_steps",
            "weight_decay",
            "checkpoint_every_orders",
            "shards_above_mb",
        )
    ),
    *(f"federation.{k}" for k in ("retries", "restarts", "offline_grace_s", "reply_grace_s")),
    *(f"federation.{k}" for k in ("retry_delay_s", "evaluate_every", "final_evaluation_s")),
    *("federation.backoff_s", "federation.backoff_max_s"),
)
INTERVALS = {
    "seed": "[0, 9e18]",  # what both numpy and torch take
    "train.min_lr_ratio": "[0, 1]",
    "train.goldfish_k": "[2, 1e6]",
    "train.goldfish_h": "[1, 1e6]",
    "exchange.feedback": "[0, 1]",
    "federation.clip_update_quantile": "(0, 1)",
    "allocation.renew_quantile": "(0, 1)",
    "data.held_out_fraction": "(0, 1)",
    "model.lora.dropout": "[0, 1)",
}
PASSWORD = re.compile(r"//([^/:]*):[^/]*@")
ENCODER_DECODERS = ("mt5", "t5")
# Families whose layers the trainer cannot split over ranks, see `flwr_hpc.train.parallel`.
UNSPLIT = ("gpt2", "mixtral")
# What models call their sizes: transformers' usual name, and those of GPT-2 and its like.
SIZES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("n_inner", "ffn_dim", "d_ff"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": (),
    "head_dim": ("d_kv",),
    "vocab_size": (),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
}


def check_values(c: Any) -> None:
    """Check every setting that can be judged without looking at any machine.

    Parameters
    ----------
    c : flwr_hpc.config.schema.Config
        Not typed, because that module calls this one.
    """
    for key, choices in CHOICES.items():
        one_of(key, attrgetter(key)(c), choices)
    for keys, check in ((POSITIVE, positive), (NOT_NEGATIVE, not_negative)):
        for key in keys:
            if (value := attrgetter(key)(c)) is not None:
                check(key, value)
    for key, interval in INTERVALS.items():
        if (value := attrgetter(key)(c)) is not None:
            within(key, value, interval)
    if c.federation.clip_update_norm and c.federation.clip_update_quantile:
        raise UserError(
            "federation.clip_update_norm and federation.clip_update_quantile are two ways to say "
            "how long an update may be: give one of them"
        )
    if c.allocation.renew_ahead not in ("forecast", "off"):
        _check_walltime("allocation.renew_ahead", c.allocation.renew_ahead)
    if len(c.train.betas) != 2:
        raise UserError(f"train.betas takes two numbers, found {c.train.betas}")
    for i, beta in enumerate(c.train.betas):
        within(f"train.betas[{i}]", beta, "[0, 1)")
    for name, facility in c.facilities.items():
        check_shape(name, facility)
        ranks = facility.nodes * facility.ranks_per_node
        check_mesh(ranks, c.train.replicate, c.train.tensor, name)
        batch_size.shared(c.train, ranks, name)
    _check_limits(c)
    _check_sites(c.serve)
    _check_pairs(c.data)
    _check_paths(c)
    _check_store(c.exchange.store or "")
    ServerMemory.of(c.exchange.memory_gb)
    _check_model(c)
    if not c.strategy.get("_target_"):
        raise UserError(
            "strategy._target_ must name a Flower Strategy, e.g. strategies.diloco.DiLoCo"
        )


def check_mesh(ranks: int, replicate: int, tensor: int, facility: str = "") -> None:
    """Refuse ranks that are no replicas x shards x tensor ranks."""
    of = f" of {facility} (nodes x ranks_per_node)" if facility else ""
    if ranks % tensor:
        raise UserError(
            f"train.tensor={tensor}: groups of {tensor} ranks cannot share the {ranks} ranks{of}. "
            f"Valid: {_divisors(ranks)}"
        )
    if ranks // tensor % replicate:
        groups = f" in groups of train.tensor={tensor}" if tensor > 1 else ""
        raise UserError(
            f"train.replicate={replicate} replicas cannot share the {ranks} ranks{of}{groups}. "
            f"Valid: {_divisors(ranks // tensor)}"
        )


def check_tensor(sizes: Mapping[str, Any], tensor: int) -> None:
    """Refuse to split a model's layers over so many ranks, as far as its configuration says.

    Parameters
    ----------
    sizes : mapping
        ``model.config``, or the ``config.json`` of a checkpoint.
    tensor : int
    """
    if tensor == 1:
        return
    if (kind := sizes.get("model_type")) in UNSPLIT:
        raise UserError(
            f"train.tensor={tensor} cannot split the layers of model_type={kind} (families like "
            "Llama, Qwen, Gemma, GPT-NeoX and T5 can be split). Valid: train.tensor=1"
        )
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    split = {key: sizes[key] for name in names if sizes.get(key := size_key(sizes, name))}
    if any(size % tensor for size in split.values()):
        given = ", ".join(f"{key}={size}" for key, size in split.items())
        raise UserError(
            f"train.tensor={tensor} does not divide the model's {given}. "
            f"Valid: {_divisors(math.gcd(*split.values()))}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _check_limits(c: Any) -> None:
    """Refuse jobs larger than the site itself allows."""
    limits = c.site.limits
    for name, f in c.facilities.items():
        if limits.nodes is not None and f.nodes > limits.nodes:
            raise UserError(
                f"facilities.{name}.nodes={f.nodes} is above site.limits.nodes={limits.nodes}"
            )
        if limits.walltime is not None and walltime_s(f.walltime) > walltime_s(limits.walltime):
            raise UserError(
                f"facilities.{name}.walltime={f.walltime} is above "
                f"site.limits.walltime={limits.walltime}"
            )


def _check_sites(serve: Any) -> None:
    for key in ("address", "listen"):
        value = getattr(serve, key)
        if value is not None and not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]*):\d{1,5}", value):
            raise UserError(
                f"serve.{key}={value} must be HOST:PORT, e.g. serve.{key}=train.example.org:8443"
            )
    for name in serve.sites:
        check_site_name(name)


def check_site_name(name: str) -> None:
    """Refuse a name that could not be that of a file, a job or a facility."""
    if not re.fullmatch(r"[A-Za-z]\w{0,40}", name, re.ASCII):
        raise UserError(
            f"'{name}' cannot be the name of a site: letters, digits and _ only, e.g. leonardo"
        )


def _check_walltime(key: str, text: str) -> None:
    try:
        walltime_s(text)
    except UserError:
        raise UserError(
            f"{key}={text} must be forecast, off or a walltime. Example: {key}=02:00:00"
        ) from None


def _check_pairs(data: Any) -> None:
    """Refuse what has no prompts and completions where these are wanted."""
    if data.objective != SEQ2SEQ:
        if data.target_len is not None:
            raise UserError(
                f"data.target_len={data.target_len} is of what a decoder writes with "
                f"data.objective={SEQ2SEQ}. Leave data.target_len out, or give that objective"
            )
        return
    if data.kind not in RECORDS:
        raise UserError(
            f"data.objective={SEQ2SEQ} learns to write the completion of a prompt, and "
            f"data={data.kind} holds texts alone. Give records with both, data=jsonl or "
            f"data=parquet, or data.objective={SPAN_CORRUPTION}"
        )
    if data.passages:
        raise UserError(
            f"data.passages are put among texts, and data.objective={SEQ2SEQ} takes none: leave "
            "out one of them"
        )


def _check_paths(c: Any) -> None:
    for key in ("paths", "held_out_paths"):
        for name in getattr(c.data, key):
            if c.facilities and name not in c.facilities:
                raise UserError(
                    f"data.{key}.{name}: no facility of that name in this run."
                    f"{closest(name, c.facilities)} Facilities: {', '.join(c.facilities)}."
                )
    if c.data.kind != "stdlib":
        for name in c.facilities:
            if not c.data.paths.get(name):
                raise UserError(
                    f"data={c.data.kind} needs the files of facility '{name}'. "
                    f"Add to the command: 'data.paths.{name}=[/path/to/files/*]'"
                )


def _check_store(url: str) -> None:
    """Refuse a secret in a URL, which is written into the run's files, invitations and logs."""
    if found := PASSWORD.search(url):
        without = PASSWORD.sub(rf"//{found[1]}@", url)
        raise UserError(
            "exchange.store has a password in it, which would be written into the run's folder, "
            "logs and invitations. Keep it on each machine (SFTP: a key in ~/.ssh or an "
            f"ssh-agent; S3: ~/.aws/credentials), and name exchange.store={without}"
        )


def _check_model(c: Any) -> None:
    if c.train.tf32 and c.train.precision == "bf16":
        raise UserError(
            "train.tf32 is for matrix products in fp32, and train.precision=bf16 has none: leave "
            "out one of train.tf32 and train.precision"
        )
    if c.train.loss == "goldfish" and c.data.objective != NEXT_TOKEN:
        raise UserError("train.loss=goldfish goes with data.objective=next_token alone")
    if c.model.lora.freeze_a and c.model.lora.r == 0:
        raise UserError("model.lora.freeze_a needs an adapter. Add to the command: model.lora.r=8")
    if c.model.lora.dora and not c.model.lora.r:
        raise UserError("model.lora.dora is a kind of adapter: give its rank, e.g. model.lora.r=8")
    if c.model.lora.quantize != "none":
        _check_quantized(c)
    if c.train.cpu_offload and (c.train.tensor > 1 or c.model.lora.quantize != "none"):
        key = "train.tensor" if c.train.tensor > 1 else "model.lora.quantize"
        raise UserError(
            f"train.cpu_offload keeps in the host's memory what is sharded, and {key} has other "
            f"weights on the GPU: leave out one of train.cpu_offload and {key}"
        )
    if c.model.lora.dora and c.model.lora.freeze_a:
        raise UserError(
            "model.lora.freeze_a makes the average of adapters exact, and DoRA's magnitudes would "
            "make it inexact again: leave out one of model.lora.freeze_a and model.lora.dora"
        )
    if c.train.tensor > 1 and (c.model.lora.dora or c.model.lora.quantize != "none"):
        key = "model.lora.dora" if c.model.lora.dora else "model.lora.quantize"
        raise UserError(
            f"{key} takes matrices as a whole, and train.tensor splits them: leave out one of "
            f"{key} and train.tensor"
        )
    if c.model.path:
        return
    if c.model.lora.r > 0:
        raise UserError(
            "model.lora adapts a checkpoint. Add to the command: model.path=DIRECTORY_OR_HUB_NAME"
        )
    if not c.model.config.get("model_type"):
        raise UserError("model: give model.path or model.config with a model_type")
    _check_sizes(c.model.config, c.data.seq_len)
    check_tensor(c.model.config, c.train.tensor)
    check_objective(c.model.config["model_type"] in ENCODER_DECODERS, c.data.objective)


def _check_quantized(c: Any) -> None:
    """Refuse frozen weights in 4 bit where there is no adapter, or no GPU."""
    wanted = f"model.lora.quantize={c.model.lora.quantize}"
    if not c.model.lora.r:
        raise UserError(
            f"{wanted} is of the weights below an adapter. Add to the command: model.lora.r=8"
        )
    if cpus := [name for name, f in c.facilities.items() if not f.gpus_per_node]:
        raise UserError(
            f"{wanted} trains on GPUs, and {cpus[0]} has gpus_per_node=0. Give its GPUs, "
            f"facilities.{cpus[0]}.gpus_per_node=N, or model.lora.quantize=none"
        )


def check_objective(encoder_decoder: bool, objective: str) -> None:
    """Refuse an objective that is not one of the model's kind."""
    if encoder_decoder == (objective != NEXT_TOKEN):
        return
    if encoder_decoder:
        raise UserError(
            f"data.objective={objective} is not for an encoder-decoder. Add to the command: "
            f"data.objective={SPAN_CORRUPTION} for texts, data.objective={SEQ2SEQ} for records of "
            "a prompt and a completion"
        )
    raise UserError(
        f"data.objective={objective} is not for a causal model. Add to the command: "
        f"data.objective={NEXT_TOKEN}, which takes texts, conversations, and records of a prompt "
        "and a completion"
    )


def size_key(sizes: Mapping[str, Any], size: str) -> str:
    """Return under which of its names a model's configuration gives a size, or its usual one."""
    return next((key for key in (size, *SIZES[size]) if sizes.get(key) is not None), size)


def _check_sizes(sizes: dict[str, Any], seq_len: int) -> None:
    """Find what transformers would refuse inside the job, as far as the numbers alone say it."""
    keys = {size: size_key(sizes, size) for size in SIZES}
    for key in keys.values():
        value = sizes.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"model.config.{key}={value} must be a whole number")
        positive(f"model.config.{key}", value)
    _check_heads(sizes, keys)
    key = keys["max_position_embeddings"]
    longest = sizes.get(key)
    if longest and seq_len > longest:
        raise UserError(
            f"data.seq_len={seq_len} is longer than model.config.{key}={longest} allows. "
            f"Add to the command: model.config.{key}={seq_len}"
        )


def _check_heads(sizes: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    width_key, heads_key = keys["hidden_size"], keys["num_attention_heads"]
    width, heads, groups = (sizes.get(k) for k in (width_key, heads_key, "num_key_value_heads"))
    if width and heads and width % heads and not sizes.get(keys["head_dim"]):
        raise UserError(
            f"model.config.{width_key}={width} cannot be shared by {heads_key}={heads}. "
            f"Add to the command: model.config.{width_key}={-(-width // heads) * heads}"
            + (", or give model.config.head_dim" if width_key == "hidden_size" else "")
        )
    if heads and groups and heads % groups:
        raise UserError(
            f"model.config.{heads_key}={heads} must be a multiple of "
            f"num_key_value_heads={groups}. "
            f"Add to the command: model.config.num_key_value_heads={heads}"
        )
