"""What of a codec is done in the job: each rank encodes the rows that it has trained. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr_hpc.exchange.codec import Codec, make_codec
from flwr_hpc.exchange.compression.feedback import Feedback, KeptError
from flwr_hpc.exchange.shards.cuts import Cut, Sliced
from flwr_hpc.exchange.shards.manifest import (
    PAYLOAD,
    SHA256,
    SUFFIX,
    Manifest,
    Shard,
    WeightFiles,
    remove_others,
    shard_file,
)
from flwr_hpc.exchange.tensors import Layout, Tensors


@dataclass(frozen=True)
class Start:
    """What an order's weights are sent as an update of."""

    order_id: str
    weights: Path  # The version that it started from, known to the server by the file's name
    former: str = ""  # Order whose error goes with it, if any


@dataclass(frozen=True)
class Encoded:
    """A rank's rows, written."""

    shard: Shard
    error: KeptError | None = None  # What the codec left out, where that is kept


class Encoder:
    """Writes trained weights as payloads that travel as they are.

    Each rank encodes its rows; rank 0 then publishes what they make up.

    Parameters
    ----------
    codec : Codec
    feedback : Feedback or None
        Keeps what the codec leaves out.
    """

    def __init__(self, codec: Codec, feedback: Feedback | None = None) -> None:
        self._codec, self._feedback = codec, feedback

    def start(self, order_id: str, weights: Path | None) -> Start | None:
        """Return what to send an update of, None where whole weights are sent; for rank 0 to ask.

        Weights that came inside a message are no version that the server could look up.
        """
        if weights is None or not self._codec.relative or not SHA256.fullmatch(weights.stem):
            return None
        return Start(order_id, weights, self._feedback.begin(order_id) if self._feedback else "")

    def is_plain(self, start: Start | None) -> bool:
        """Whether what is sent are the weights' own safetensors files."""
        return self._codec.is_plain(start is not None)

    def encode(
        self, path: Path, tensors: Tensors, cut: Cut, start: Start | None, part: tuple[int, int]
    ) -> Encoded:
        """Write a shard.

        Parameters
        ----------
        path : Path
            Of what would be the plain file.
        tensors : Tensors
            Rows of trained weights.
        cut : mapping
            Which these are.
        start : Start or None
        part : tuple of int
            Number of the shard, and how many files there are.
        """
        file = shard_file(path.with_suffix(PAYLOAD), *part)
        base = Sliced(WeightFiles.open(start.weights).whole, cut) if start else None
        feedback = self._feedback if base is not None else None
        meant = tensors
        if feedback and start:
            meant = feedback.corrected(start.former, tensors, cut)
        sha256 = self._codec.encode(meant, file, base)
        shard = Shard(sha256, file.stat().st_size, cut, file.name)
        if feedback is None or start is None or base is None:
            return Encoded(shard)
        sent = self._codec.decode(file, base, tensors.layout)
        return Encoded(shard, feedback.keep(start.order_id, part, meant, sent, base, cut))

    def publish(
        self, path: Path, layout: Layout, parts: Sequence[Encoded], start: Start | None
    ) -> tuple[str, dict[str, float]]:
        """Publish a manifest once all shards are written, the error before it.

        Parameters
        ----------
        path : Path
            Of what would be the plain file; the manifest lies beside it, alone with its shards.
        layout : Layout
            Of the whole.
        parts : sequence of Encoded
        start : Start or None

        Returns
        -------
        tuple
            The manifest's sha256, and metrics: ``sent_share``, the payloads' bytes as a share of
            the weights', and ``codec_error``, the norm of what the codec left out as a share of the
            update's.
        """
        manifest = Manifest(
            layout, [part.shard for part in parts], start.weights.stem if start else ""
        )
        metrics = {}
        if not self.is_plain(start):
            metrics["sent_share"] = manifest.nbytes / sum(info.nbytes for info in layout.values())
        errors = [part.error for part in parts if part.error]
        if errors and start and self._feedback:
            share = self._feedback.publish(start.order_id, start.former, layout, errors)
            metrics["codec_error"] = share
        target = path.with_suffix(SUFFIX)
        sha256 = manifest.write(target)
        remove_others(path, target)
        return sha256, metrics


def make_encoder(setting: object, gamma: float, folder: Path) -> Encoder:
    """Return what ``exchange.codec`` and ``exchange.feedback`` ask for.

    Parameters
    ----------
    setting : str or list of str
    gamma : float
        Share of the error that goes with the next update.
    folder : Path
        Where the error is kept, on a disk that outlives jobs.
    """
    codec = make_codec(setting)
    return Encoder(codec, Feedback(folder, gamma) if gamma > 0 and codec.tolerance > 0 else None)
