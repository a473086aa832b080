"""The whole configuration as dataclasses, validated. Standard library and omegaconf only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flwr_hpc.config.facility import AUTO, LOCAL, FacilityConfig
from flwr_hpc.config.validate import check_values
from flwr_hpc.errors import UserError, closest

T = TypeVar("T")


@dataclass
class LoraConfig:
    """Low-rank adapters (peft); only they are trained and exchanged. Rank 0: none."""

    r: int = 0
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str = "all-linear"
    freeze_a: bool = False  # FFA-LoRA: A stays as drawn, B alone is trained and exchanged
    # DoRA (arXiv 2402.09353): the norm of each output's weights is trained apart from their
    # direction, which the adapter changes; nearer to full training, and slower than LoRA.
    dora: bool = False
    # ``nf4``: the frozen weights of the layers in 4 bit (QLoRA, arXiv 2305.14314; bitsandbytes, on
    # GPUs), whole on every rank; or ``none``.
    quantize: str = "none"


@dataclass
class ModelConfig:
    """A causal language model or an encoder-decoder of transformers."""

    # Local directory or hub name of a checkpoint; its weights are the start.
    path: str | None = None
    # Arguments of ``transformers.AutoConfig.for_model`` (``model_type`` and its sizes), to
    # start from random weights; used when `path` is not set. ``vocab_size`` defaults to the
    # tokenizer's.
    config: dict[str, Any] = field(default_factory=dict)
    # The trained model is saved in files of at most so many GB, with an index.
    max_shard_gb: float = 5.0
    lora: LoraConfig = field(default_factory=LoraConfig)  # On with ``lora.r`` above 0; needs `path`


@dataclass
class DataConfig:
    """What each facility trains on."""

    # ``stdlib`` (source code of the installed Python), ``text``, ``jsonl`` or ``parquet``.
    kind: str = "stdlib"
    # Files or globs per facility name; for ``stdlib`` package names (default: the packages
    # dealt out among the facilities).
    paths: dict[str, list[str]] = field(default_factory=dict)
    # Files kept for evaluation; default: `held_out_fraction` of the training documents.
    held_out_paths: dict[str, list[str]] = field(default_factory=dict)
    held_out_fraction: float = 0.05
    # ``byte``, a local directory or a hub name; default: that of `model.path`, else ``byte``.
    tokenizer: str | None = None
    seq_len: int = 256  # Tokens per training sequence; of an encoder-decoder, of its encoder's
    # Tokens that a decoder is to write at most, for ``seq2seq``; default: `seq_len`.
    target_len: int | None = None
    # Keep the documents of a sequence apart: no token sees or predicts one of another document, and
    # positions restart with each. An encoder-decoder's are not kept apart.
    document_mask: bool = True
    # ``next_token``, or for encoder-decoders ``span_corruption`` of texts (T5, arXiv 1910.10683) or
    # ``seq2seq``: the encoder reads a record's prompt, the decoder writes its completion.
    objective: str = "next_token"
    # Columns of jsonl and parquet records; a record with a prompt and a completion takes
    # the loss on the completion alone, one with messages (``role`` and ``content``) on the
    # assistant's.
    text_key: str = "text"
    prompt_key: str = "prompt"
    completion_key: str = "completion"
    messages_key: str = "messages"
    # How messages become text: a file with a Jinja template, or ``chatml``; default: as the
    # tokenizer says.
    chat_template: str | None = None
    # JSON lines of ``text`` and ``repetitions``: put among every facility's training documents so
    # often, for `python -m flwr_hpc.memorize`.
    passages: str | None = None
    held_out_sequences: int = 64  # At most so many sequences are evaluated


@dataclass
class TrainConfig:
    """The trainer inside an allocation."""

    steps: int = 110  # Inner optimizer steps per order (H)
    # ``none``, or ``auto``: micro batch, accumulation, checkpointing and mesh of the fastest
    # plan for the facilities at hand (`python -m flwr_hpc.plan`), but for those the command names.
    plan: str = "none"
    micro_batch: int = 4  # Sequences per rank (or group of `tensor` ranks) and forward pass
    # Micro batches per optimizer step; global batch = micro_batch x accumulation x ranks / tensor.
    accumulation: int = 1
    # Sequences of an optimizer step over all ranks of a facility; sets the accumulation, with
    # `micro_batch` at most. Default: as many as micro batches and accumulation make.
    batch_size: int | None = None
    # Sum the gradients over the ranks after every micro batch; false: once per step, which sends
    # less and keeps whole gradients on every rank.
    sync_every_micro_batch: bool = True
    # Linear warm-up, then cosine to ``lr x min_lr_ratio`` at `schedule_steps` steps of this
    # facility (default: rounds x steps), over the whole run and not one round.
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 20
    schedule_steps: int | None = None
    # AdamW; `clip` is the largest global gradient norm (0: no clipping).
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    # ``cross_entropy``, or ``goldfish`` (arXiv 2406.10209), which leaves out about every
    # `goldfish_k`-th token, chosen by a hash of the `goldfish_h` tokens before it.
    loss: str = "cross_entropy"
    goldfish_k: int = 4
    goldfish_h: int = 13
    precision: str = "auto"  # ``auto`` (bf16 where the device has it), ``fp32`` or ``bf16``
    # GPUs may round the factors of matrix products in fp32 to TF32 (10 bits of mantissa), which is
    # several times faster there.
    tf32: bool = False
    # Compile each layer (torch.compile) when it first runs: minutes once, fewer and larger kernels
    # from there on. Takes a C++ compiler in the job.
    compile: bool = False
    # What of the activations the backward pass computes again: ``none``, ``selective`` (all but
    # the results of matrix products and attention) or ``full`` (each layer).
    activation_checkpointing: str = "none"
    # Weights, gradients and the optimizer's moments lie in the host's memory, and the CPU takes the
    # optimizer's step; a layer's weights are sent to the GPU when it works.
    cpu_offload: bool = False
    # Replicas of the sharded model (HSDP): each has ranks / replicate neighbouring ranks, over
    # which it is sharded, and gradients are summed over the replicas once per step. 1: FSDP.
    replicate: int = 1
    # Tensor parallelism: so many neighbouring ranks split the matrices of each layer and work on
    # the same sequences. A replica's ranks are shards x tensor.
    tensor: int = 1
    reset_optimizer: bool = False  # Forget the inner optimizer's state at every order
    # Save the trainer's state after so many training orders (0: never).
    checkpoint_every_orders: int = 1
    # Weights of so many MB and more are written by all ranks, each its own shard, and travel as
    # these are; of smaller ones rank 0 makes one file.
    shards_above_mb: float = 256.0


@dataclass
class ExchangeConfig:
    """How weights travel."""

    # fsspec URL of a place both the server and the sites reach; default: a folder in the run
    # directory.
    store: str | None = None
    # What the bytes of a payload are: a file of flwr_hpc/exchange/codecs, or the import path
    # of a class of your own; or several, of which each takes the values that the one before it
    # selects: ``[topk,int2]``.
    codec: Any = "full"
    # Likewise for what the server sends: ``full`` (every version whole), or a codec of updates of
    # what a site is known to have. What it leaves out goes with the next version.
    downlink: Any = "full"
    # Share of what a lossy codec left out of a site's update that goes with its next one (0: none).
    feedback: float = 0.95
    inline_below_mb: float = 0.1  # Smaller payloads travel inside the Flower message
    # What decoding and averaging may take of the server's memory, whatever the model and however
    # many the sites. Pages of mapped files come on top, which the system takes back when it likes.
    memory_gb: float = 1.0
    quota_gb: float = 1000.0  # What a site's payloads may take of the disk behind the server's port
    # A site's payload of which nothing has come for so many seconds is given up: its order failed.
    stall_s: float = 300.0


@dataclass
class AllocationConfig:
    """Life of an allocation."""

    # ``warm`` (one job works on order after order) or ``per_round`` (a job for each order).
    policy: str = "warm"
    # When the successor of a warm allocation is submitted: ``forecast`` (so that its expected
    # start meets the end of the current one), ``off`` (when the current one has ended and an
    # order waits) or a walltime before the end, e.g. ``02:00:00``.
    renew_ahead: str = "forecast"
    # Of the forecast wait, for ``forecast``: above 0.5 the successor comes rather too early.
    renew_quantile: float = 0.5
    # At most so many successors wait in the queue: where waits are longer than walltimes it takes
    # more than one to let each begin when the one before it ends. Otherwise one at a time waits.
    max_successors: int = 3
    # A job that has waited longer is cancelled and counts as failed.
    queue_deadline_s: float = 604800.0
    idle_timeout_s: float = 600.0  # The worker ends when no order came for so long
    # An allocation whose work stands still for so long, and for ten times as long as the same work
    # took before, hangs and is replaced; six times as long before anything is measured. 0: never.
    progress_timeout_s: float = 600.0
    retries: int = 2  # How often a job that died is replaced while the same order waits
    # Whether a job that somebody cancelled is replaced like one that died; false: there is none
    # at this site any more, and what would need one fails.
    replace_cancelled: bool = True


@dataclass
class FederationConfig:
    """How the strategy and the sites keep in touch. Times are seconds; None: wait for ever."""

    # Longest time a site holds a message before it answers with the state so far.
    wait_s: float = 120.0
    # Give up on an allocation that has not started by then.
    acquire_deadline_s: float | None = None
    # Give up on an order so long after it was submitted.
    order_deadline_s: float | None = None
    # How long a site may be unreachable before its order is given up, and all sites before the run
    # is; default: 600, or a day where sites are on other hosts: a person may have to mend the line.
    offline_grace_s: float | None = None
    retries: int = 2  # How often an order that failed is sent again
    reply_grace_s: float = 900.0  # A reply later than `wait_s` by so much is taken for lost
    poll_s: float = 0.5  # Pause of the server's loop when nothing happened
    retry_delay_s: float = 5.0  # Pause before something is tried again
    ttl_s: float = 604800.0  # Flower's time to live of every message
    evaluate_every: int = 1  # Evaluate every so many versions together with training (0: never)
    final_evaluation_s: float = 600.0  # Time for the evaluation of the last version (0: none)
    # A synchronous round aggregates what has arrived by then.
    round_deadline_s: float | None = None
    min_sites: int = 1  # A synchronous round with fewer results has failed
    # So many failed rounds in a row (asynchronous: failures of every site) end the run.
    max_failed_rounds: int = 3
    # First and longest pause of a failing site, where no round waits for it (0:
    # `retry_delay_s` each time).
    backoff_s: float = 30.0
    backoff_max_s: float = 900.0
    partial_work: bool = True  # A result of fewer steps than were ordered counts
    # Refuse an update whose norm is above so many times the median of its site's last ones
    # (e.g. 10); reads both models once more for every result. None: no limit.
    update_norm_limit: float | None = None
    # Scale an update whose norm is above this, or above this quantile of the norms of all sites'
    # last updates (e.g. 0.5), down to it; reads both models once more, too. None: as they come.
    clip_update_norm: float | None = None
    clip_update_quantile: float | None = None
    # How often the driver starts Flower anew, from the last aggregation, when SuperLink or
    # the ServerApp died.
    restarts: int = 2
    # Start also where this system does not say whose a connection is: whoever can log in to this
    # host can then run code as you. Nothing changes where it does.
    shared_host: bool = False


@dataclass
class ServeConfig:
    """A server for sites of other centres, see `python -m flwr_hpc.serve`."""

    address: str | None = None  # ``HOST:PORT`` by which they reach it
    # ``HOST:PORT`` where it listens; default: every interface, at the port of `address`. Behind a
    # tunnel or a proxy that hands on TCP both differ.
    listen: str | None = None
    sites: list[str] = field(default_factory=list)  # Who is invited from the beginning


@dataclass
class LimitsConfig:
    """What a site allows at most; None: no limit."""

    node_hours: float | None = None  # All its jobs of this run together, by what they may take
    walltime: str | None = None  # Of one job
    nodes: int | None = None  # Of one job
    steps: int | None = None  # Optimizer steps of one order


@dataclass
class SiteConfig:
    """What a centre decides for itself."""

    # Folder of a site that joins; default: sites/RUN_KEY under the current folder. Jobs read and
    # write there, unless the facility's `workdir` says where.
    dir: str | None = None
    limits: LimitsConfig = field(default_factory=LimitsConfig)


@dataclass
class TrackingConfig:
    """Where metrics go besides the run directory."""

    wandb: bool = False
    project: str = "flwr-hpc"
    entity: str | None = None
    mode: str = "auto"  # auto: online when logged in, else offline


@dataclass
class Config:
    """One run."""

    rounds: int = 6
    seed: int = 0
    run_dir: str | None = None
    resume: str | None = None
    dry_run: bool = False
    detach: bool = False
    ssh_config: str | None = None  # In place of ``~/.ssh/config``
    facilities: dict[str, FacilityConfig] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    site: SiteConfig = field(default_factory=SiteConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def here(self) -> dict[str, FacilityConfig]:
        """Return the facilities whose sites are on this machine."""
        return {name: f for name, f in self.facilities.items() if not f.ssh}

    @property
    def by_ssh(self) -> dict[str, FacilityConfig]:
        """Return those whose sites are started on other hosts."""
        return {name: f for name, f in self.facilities.items() if f.ssh}


def parse(raw: DictConfig | dict[str, Any]) -> Config:
    """Turn a composed configuration into a checked `Config`."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), raw)
        for facility in merged.facilities.values():
            if facility.scheduler == LOCAL and facility.account == AUTO:
                facility.account = None
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as exc:
        raise UserError(explain(exc)) from None
    assert isinstance(config, Config)
    check_values(config)
    return config


def decode(kind: type[T], raw: Mapping[str, Any], source: str) -> T:
    """Build a dataclass from JSON; every field must be there, of its type, and no other.

    Parameters
    ----------
    kind : type
        A dataclass, nested ones included.
    raw : mapping
    source : str
        Where it comes from, for the message.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), raw))
    except OmegaConfBaseException as exc:
        raise UserError(f"{source}: {explain(exc)}") from None
    assert isinstance(config, kind)
    return config


def explain(exc: OmegaConfBaseException) -> str:
    """Say what is wrong with a setting, and what would be valid."""
    key = getattr(exc, "full_key", None) or ""
    first = str(exc).splitlines()[0]
    if "Key '" in first and "not in" in first:
        name = str(getattr(exc, "key", key))
        owner = getattr(exc, "object_type", None)
        valid = [f.name for f in fields(owner)] if is_dataclass(owner) else []
        choices = f" Valid keys: {', '.join(valid)}." if valid else ""
        return f"unknown configuration key '{key or name}'.{closest(name, valid)}{choices}"
    if "missing mandatory value" in first.lower():
        return f"{key} must be given. Add it to the command: {key}=VALUE"
    return f"'{key}': {first}"
