"""How much every reply of a round counts, and the average that a rule of Flower's kind takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.app import Message
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy

from flwr_hpc.protocol import WEIGHT_KEY
from strategies.engine import messages
from strategies.parts.lora.adapters import Combination, mean_of
from strategies.parts.rules import normalised

# Of Flower's: a median, Krum or what differential privacy clips is no average of the replies.
AVERAGING = [c.aggregate_train for c in (FedAvg, FedAvgM, FedAdam, FedAdagrad, FedYogi)]


def shares_of(
    strategy: Strategy, replies: Sequence[Message], facility_of: Mapping[int, str]
) -> dict[str, float]:
    """Return every site's part in a round's version; in the order of the replies."""
    own = getattr(strategy, "weight_of", _examples)
    weights = {facility_of[r.metadata.src_node_id]: float(own(r)) or 1e-12 for r in replies}
    return dict(zip(weights, normalised(list(weights.values())), strict=True))


def average_of(
    strategy: Strategy, replies: Sequence[Message], shares: Mapping[str, float]
) -> Combination | str:
    """Return the average of the replies that a round's version comes from, or why there is none."""
    wraps = isinstance(getattr(strategy, "strategy", None), Strategy)
    ours = callable(getattr(strategy, "weight_of", None)) and not wraps
    if not ours and type(strategy).aggregate_train not in AVERAGING:
        return f"{type(strategy).__name__} is not known to average the replies"
    models = [next(iter(r.content.array_records.values())) for r in replies]
    return mean_of(models, list(shares.values()))


def _examples(reply: Message) -> float:
    return messages.flat_metrics(reply).get(WEIGHT_KEY, 1.0)
