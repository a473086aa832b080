"""What the bytes of a payload are. A codec is one class in `codecs/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

from flwr_hpc.exchange import codecs, registry
from flwr_hpc.exchange.tensorfile import file_size_range
from flwr_hpc.exchange.tensors import Layout, Tensors


class Codec(ABC):
    """Turns tensors into a payload file and back, on both ways between server and site.

    Both methods take one tensor at a time. `base` is a version of the global model that both
    sides have: what the site decoded its order's weights from. It is None for what the server
    publishes, which any site must be able to read alone, for codecs that are not `relative`,
    and where the site was sent no such version; a payload then has to stand for itself.
    """

    relative: ClassVar[bool] = False  # Makes use of a base
    tolerance: ClassVar[float] = 0.0  # By how much of its size a value may change on the way
    dtypes: ClassVar[tuple[str, ...]] = ()  # Of decoded floats, besides the model's own

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

    def size_range(self, layout: Layout, accept: Collection[str] = ()) -> tuple[int, int]:
        """Return how many bytes a payload of a layout has, at least and at most.

        Floats may have the dtypes in `accept`. Nothing of another size is fetched.
        """
        return 1, file_size_range(layout, accept)[1]


def codec_names() -> list[str]:
    """Return the codecs that are there."""
    return registry.names(codecs)


def make_codec(name: str) -> Codec:
    """Return the codec that ``exchange.codec`` names."""
    made: Codec = registry.find("exchange.codec", name, codecs, Codec)()
    return made
