"""What a strategy and a site say to each other: message types, order and status records.

An *order* asks a site for one piece of work and is idempotent: its id is (run key, facility,
sequence number), so an order sent twice is trained once. Every message may carry ``wait_s``;
it is then answered after that many seconds at the latest with the state reached so far, and
asked again with `COLLECT`. Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

# Of all that server and site say to each other, over the exchange, too: raised with every change
# that one side could not understand of the other.
PROTOCOL = 1
PROTOCOL_HEADER = "flwr-hpc-protocol"  # Of every request to the exchange

# Flower message types.
TRAIN = "train"
EVALUATE = "evaluate"
DESCRIBE = "query.describe"
ACQUIRE = "query.acquire"
COLLECT = "query.collect"
FORECAST = "query.forecast"
RELEASE = "query.release"

# Keys of the records in a message.
ARRAYS = "arrays"  # ArrayRecord: weights of the global model, or of the trained one
CORRECTION = "correction"  # ArrayRecord: to be added to every gradient of the order
GRADIENT = "gradient"  # ArrayRecord: mean of the gradients of the order's steps
METRICS = "metrics"  # MetricRecord of a finished order
# ArrayRecord: low-rank factors that are added to the frozen weights under adapters, for the order
# alone: U by the name of an adapter's B and V by that of its A.
RESIDUAL = "residual"
ORDER = "order"  # ConfigRecord {"json": Order}
STATUS = "status"  # ConfigRecord {"json": Status}
WAIT = "wait"  # ConfigRecord {"wait_s": float}; absent: block until done

MAX_STATUS = 256 << 20  # characters of a status, with a tokenizer's files in it
MAX_NUMBER = 1e300  # of what a site says: sums of such numbers are finite, too

WEIGHT_KEY = "num-examples"  # Flower's own name for the weight of a reply

# Of an order's options: sha256 of the frozen base that the run's adapter was begun on (LoRA).
BASE = "base-sha256"
BASE_FILE = "base.json"  # Of a model's small files: the same hash, for who loads the adapter
# Of an order's options: reply with the mean gradient, too.
MEAN_GRADIENT = "mean-gradient"
# Start from the weights plus this share of the site's last update; the metrics of the reply say
# which share (``local_update_share``) of which order's (``local_update_seq``) it was.
LOCAL_UPDATE_SHARE = "local-update-share"

OrderKind = Literal["initialize", "train", "evaluate"]
SiteState = Literal["idle", "queued", "starting", "ready", "running", "done", "failed", "blocked"]


@dataclass(frozen=True)
class Order:
    """One request to an allocation."""

    run_key: str  # Names the training run; the same after a resume
    facility: str
    seq: int  # Counts the orders of one facility from 0
    # ``initialize`` (return the initial weights and the model's small files), ``train`` or
    # ``evaluate``.
    kind: OrderKind
    version: int = 0  # Version of the global model the order starts from
    steps: int = 0  # Optimizer steps to train; 0: as many as the site's ``train.steps``
    # Evaluate the received weights on the held-out data before training; with `merges` the
    # version they belong to, if the site has it.
    evaluate: bool = False
    # What the strategy's train config adds: ``proximal-mu`` (FedProx), ``lr-scale`` (factor
    # on the learning rate), `LOCAL_UPDATE_SHARE` and `MEAN_GRADIENT`.
    options: dict[str, Any] = field(default_factory=dict)
    # Keys of the further arrays in the message, beside the weights: `CORRECTION` and
    # `RESIDUAL`.
    extra_arrays: list[str] = field(default_factory=list)
    # The site goes on from the weights that its order with the number ``after`` (an option)
    # left there, and only these tensors, which are all that come, are merged into them: ``(1
    # - alpha) given + alpha local`` with the option ``alpha``, 0 where it is missing. A site
    # that has those weights no more refuses. None: all weights come and replace the site's.
    merges: list[str] | None = None
    returns: list[str] | None = None  # Tensors that the reply is to carry (None: all)
    # The server has taken all orders of this facility with lower numbers for good, or given them
    # up: the site need not keep what came of them.
    settled: int = 0

    @property
    def id(self) -> str:
        """Reproducible from the strategy's checkpoint."""
        return f"{self.run_key}-{self.facility}-{self.seq:06d}"

    @property
    def asks_for(self) -> tuple[str, ...]:
        """Keys of the arrays that its reply may carry."""
        if self.kind == "evaluate":
            return ()
        return (ARRAYS, GRADIENT) if self.options.get(MEAN_GRADIENT) else (ARRAYS,)


@dataclass(frozen=True)
class Result:
    """What an allocation wrote for an order; ``state`` is ``done`` or ``failed``."""

    order_id: str
    state: Literal["done", "failed"]
    # What was really trained (an order may be cut short by the walltime) or, for
    # ``evaluate``, evaluated. ``tokens`` counts the tokens the loss was taken on.
    steps: int = 0
    tokens: int = 0
    examples: int = 0
    # ``train_loss``, ``held_out_loss`` (nats per token), ``grad_norm``, ``tokens_per_s``,
    # ``mfu``, ``peak_memory_gb``, ... Only finite numbers.
    metrics: dict[str, float] = field(default_factory=dict)
    # Name of the trained weights in the order's folder: a file, or the manifest of shards.
    weights: str | None = None
    sha256: str = ""  # Of that file
    # Small text files that make the weights a Hugging Face directory (``initialize``).
    files: dict[str, str] = field(default_factory=dict)
    # Time by phase on the worker's own clock: ``read``, ``train``, ``evaluate``, ``write`` (of
    # which training waited for ``write_wait``; the next order goes on meanwhile),
    # ``first_step`` (from order seen to first optimizer step begun), and ``resumed``:
    # training of an earlier worker that a checkpoint of this order saved.
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""  # What went wrong; set when ``state`` is ``failed``
    fatal: bool = False  # Trying again will not fix it (bad data, bad configuration)
    # The site lacks what the order goes on from: it failed, but another order may do.
    refused: bool = False
    # sha256 of further arrays that were asked for, by their key in the reply; they lie beside
    # the weights as ``KEY.safetensors``, or as shards of the manifest ``KEY.json``.
    extra_arrays: dict[str, str] = field(default_factory=dict)
    note: str = ""  # What a person should know of how it was done


@dataclass(frozen=True)
class Forecast:
    """How long a job submitted now would wait in the queue, and what such forecasts were worth."""

    # Median and upper quantile of the wait; None when nothing is known.
    median_s: float | None = None
    high_s: float | None = None
    quantile: float = 0.9  # Which one `high_s` is
    # ``scheduler`` (its own plan), ``history`` (this facility's past waits), ``both`` or
    # ``none``.
    source: str = "none"
    waits: int = 0  # How many past waits went into it
    checked: int = 0  # How many earlier forecasts have since been held against the real wait
    error_s: float | None = None  # Median absolute error of those forecasts' medians
    # Share of those waits that were no longer than forecast by the upper quantile.
    coverage: float | None = None


@dataclass(frozen=True)
class Status:
    """A site's answer to any message."""

    # ``queued`` and ``starting`` tell of the allocation, ``ready`` answers `ACQUIRE`,
    # ``running``, ``done`` and ``failed`` tell of the order. ``blocked``: nothing was done, since
    # the site cannot write its folder; ask again.
    state: SiteState
    facility: str = ""
    order_id: str = ""
    # Name of the allocation that works, or waits, for this site; empty if there is none.
    allocation: str = ""
    walltime_left_s: float | None = None  # Of a started allocation
    # Forecast of what a queued allocation has still to wait: median and upper quantile.
    queue_wait_s: float | None = None
    queue_wait_high_s: float | None = None
    # Why a queued allocation waits, in the scheduler's own words, or why the site is blocked.
    reason: str = ""
    step: int = 0  # Progress of a running order
    steps: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    note: str = ""  # As in `Result`, as soon as it is known
    # Of a finished order, without the weights, which travel as the reply's arrays.
    result: Result | None = None
    # Per allocation: seconds so far in ``queue``, ``startup``, ``load``, ``train``,
    # ``evaluate``, ``transfer``, ``idle``.
    ledger: dict[str, dict[str, float]] = field(default_factory=dict)
    # Per allocation what the scheduler says of its job: ``id``, ``nodes``, ``restarts``,
    # ``submitted_s``, ``eligible_s``, ``started_s``, ``ended_s`` (Unix seconds) and
    # ``outcome``, as far as known.
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Seconds so far in which a job of the site waited in the queue and none of them ran: a
    # successor that queues while its predecessor works keeps nobody waiting.
    queued_s: float = 0.0
    forecast: Forecast | None = None  # Answers `FORECAST`
    # Of flwr_hpc, Flower, Python and torch at the site; answers `DESCRIBE`.
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # How long the site took to answer, on the site's clock
    error: str = ""  # As in `Result`
    fatal: bool = False


def to_json(record: Any) -> str:
    """Encode a dataclass as strict JSON (NaN and infinity are refused)."""
    return json.dumps(vars(record), default=_fields, allow_nan=False, sort_keys=True)


def _fields(record: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(record):
        raise TypeError(f"{record!r} is not JSON")
    return vars(record)


def read_status(text: str) -> Status:
    """Decode what a site says of itself: every field of its type, every number finite.

    Raises
    ------
    ValueError
        If it is anything else, or longer than a status with a model's small files is.
    """
    if len(text) > MAX_STATUS:
        raise ValueError(f"a status of {len(text)} characters")
    try:
        status = from_json(Status, text)
        _check_types(status, "status")
    except RecursionError:
        raise ValueError("a status nested too deeply") from None
    return status


def _check_types(value: Any, name: str) -> None:
    """Refuse a record, or JSON in it, that is not what its annotations say."""
    for f, hint, fits in _checks(cast(Any, type(value))):
        found = getattr(value, f)
        if not fits(found):
            raise ValueError(f"{name}.{f} is {str(found)[:80]!r}, expected {hint}")
        if dataclasses.is_dataclass(found):
            _check_types(found, f"{name}.{f}")


Fits = Callable[[Any], bool]


@cache
def _checks(kind: Any) -> list[tuple[str, Any, Fits]]:
    """Return a record's fields, their annotations, and what tells whether a value fits."""
    return [(f, hint, _fits(hint)) for f, hint in get_type_hints(kind).items()]


def _fits(hint: Any) -> Fits:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in args
    if origin in (Union, UnionType):
        any_of = [_fits(one) for one in args]
        return lambda value: any(fits(value) for fits in any_of)
    if origin is dict:
        of_values = _fits(args[1])
        return lambda value: isinstance(value, dict) and all(map(of_values, value.values()))
    if hint is Any:
        return _is_json
    if hint is float:
        return lambda value: type(value) in (int, float) and abs(value) <= MAX_NUMBER
    if hint is int:
        return lambda value: type(value) is int and abs(value) <= MAX_NUMBER
    return lambda value: type(value) is hint


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    return not isinstance(value, float) or math.isfinite(value)


def from_json(cls: type[T], text: str) -> T:
    """Decode what `to_json` wrote; unknown fields are ignored, so versions can differ.

    Raises
    ------
    ValueError
        If the text is not a JSON object or lacks a required field.
    """
    return from_dict(cls, json.loads(text))


def from_dict(cls: type[T], raw: Any) -> T:
    """Make a record of a JSON object; unknown fields are ignored.

    Raises
    ------
    ValueError
        If it is no object or lacks a required field.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"expected a JSON object for {cls.__name__}, found {str(raw)[:80]!r}")
    values = {k: v for k, v in raw.items() if k in _names(cast(Any, cls))}
    if cls is Status:
        for key, kind in (("result", Result), ("forecast", Forecast)):
            if isinstance(values.get(key), dict):
                values[key] = from_dict(kind, values[key])
    try:
        return cls(**values)
    except TypeError as exc:
        raise ValueError(f"not a {cls.__name__} record: {exc}") from None


@cache
def _names(kind: Any) -> frozenset[str]:
    return frozenset(f.name for f in dataclasses.fields(kind))
