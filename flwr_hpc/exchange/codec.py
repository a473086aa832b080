"""What the bytes of a payload are. A codec is one class in `codecs/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

from flwr_hpc.errors import UserError
from flwr_hpc.exchange import codecs, registry
from flwr_hpc.exchange.tensorfile import file_size_range
from flwr_hpc.exchange.tensors import Layout, TensorInfo, Tensors

KEY = "exchange.codec"
DOWNLINK = "exchange.downlink"
WHOLE = "full"


class Codec(ABC):
    """Turns tensors into a payload file and back, on both ways between server and site.

    Both methods take one tensor at a time. `base` is a version of the global model that both
    sides have: what the site decoded its order's weights from or, on the way down, those of an
    earlier one. It is None for codecs that are not `relative`, and where the site was sent no such
    version; a payload then has to stand for itself.
    """

    relative: ClassVar[bool] = False  # Makes use of a base
    # By how much of its norm an update may change on the way (without a base: the weights).
    tolerance: float = 0.0
    dtypes: ClassVar[tuple[str, ...]] = ()  # Of decoded floats, besides the model's own
    varies: ClassVar[bool] = False  # Payloads of one layout are of unlike sizes

    @abstractmethod
    def encode(self, tensors: Tensors, target: Path, base: Tensors | None = None) -> str:
        """Write the payload, published whole or not at all; return its sha256."""

    @abstractmethod
    def decode(
        self, path: Path, base: Tensors | None = None, layout: Layout | None = None
    ) -> Tensors:
        """Return the tensors of a payload, loaded lazily; BadPayload if it is malformed.

        `layout` is what must come out, where that is known: it bounds what need be read and held.
        """

    def is_plain(self, relative: bool) -> bool:
        """Whether payloads, `relative` to a base or not, are the tensors' own safetensors files."""
        return False

    def size_range(self, layout: Layout, accept: Collection[str] = ()) -> tuple[int, int]:
        """Return how many bytes a payload of a layout has, at least and at most.

        Floats may have the dtypes in `accept`. Nothing of another size is fetched.
        """
        return 1, file_size_range(layout, accept)[1]

    def payload_gb(self, parameters: int) -> float | None:
        """Return what so many float32 values become on their way, None where that is unknown.

        At most, where that `varies`.
        """
        low, _ = self.size_range({"": TensorInfo("F32", (parameters,))})
        return low / 1e9 if low > 1 else None


def codec_names() -> list[str]:
    """Return the codecs that are there."""
    return registry.names(codecs)


def stages(setting: object, key: str = KEY) -> list[str]:
    """Return the names in ``exchange.codec``: one, or several in a list."""
    names = [setting] if isinstance(setting, str) else setting
    if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise UserError(
            f"{key}={setting} must be a name or a list of names, e.g. {key}=[topk,int2]. "
            f"Valid: {', '.join(codec_names())}"
        )
    return names


def make_codec(setting: object, key: str = KEY) -> Codec:
    """Return the codec that ``exchange.codec`` names.

    Of several names each takes the values that the one before it selects; a lossless one, at the
    end, the bytes that all before it make.
    """
    *before, last = stages(setting, key)
    found = registry.find(key, last, codecs, Codec)
    if getattr(found, "lossless", False):
        return _compressed(found, last, before, key)
    made: Codec = found()
    for name in reversed(before):
        made = _followed(registry.find(key, name, codecs, Codec), name, made, key)
    return made


def make_downlink(setting: object, codec: Codec) -> Codec | None:
    """Return the codec of updates that ``exchange.downlink`` names; None for whole weights.

    A site whose replies, made by `codec`, were whole weights would take back what a lossy downlink
    left out: only an update can be added to the version that the strategy knows.
    """
    if setting == WHOLE:
        return None
    made = make_codec(setting, DOWNLINK)
    for key, found in ((f"{DOWNLINK}={setting}", made), (KEY, codec)):
        if not found.relative:
            raise UserError(
                f"{key} sends whole weights. Where {DOWNLINK} is not '{WHOLE}', both ways must "
                f"send updates: e.g. {DOWNLINK}=int8 {KEY}=int8"
            )
    return made


def _followed(found: type[Codec], name: str, values: Codec, key: str) -> Codec:
    """Return a codec whose values another one packs."""
    if not getattr(found, "selective", False) or not values.relative:
        raise UserError(
            f"{key}: nothing can follow '{name}' but what packs the values that a codec selects, "
            f"and at the end zstd. Examples: {key}=[topk,int2] {key}=[bf16,zstd]"
        )
    composed: Codec = found(values)  # type: ignore[call-arg]
    return composed


def _compressed(found: type[Codec], name: str, before: list[str], key: str) -> Codec:
    """Return a codec whose bytes a lossless one compresses."""
    examples = f"Examples: {key}=[bf16,{name}] {key}=[int4,{name}] {key}=[topk,int2,{name}]"
    if not before:
        raise UserError(f"{key}={name} compresses what other stages make. {examples}")
    values, those = make_codec(before, key), ",".join(before)
    if why := found.refused.get(those):  # type: ignore[attr-defined]
        raise UserError(f"{key}=[{those},{name}] does not pay: {why}. {examples}")
    if getattr(values, "lossless", False) or not getattr(values, "period", 0):
        raise UserError(
            f"{key}: {name} cannot follow [{those}]. It packs updates in frames: once, and what "
            f"subclasses UpdateCodec and has a period. {examples}"
        )
    composed: Codec = found(values)  # type: ignore[call-arg]
    return composed
