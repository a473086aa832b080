"""What a run keeps on disk at its peak, by arithmetic on the model's size.

Upper bounds. Not in them are prepared data, and the weights of an order that was interrupted, in
its checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32 = 4  # bytes: what travels and is trained is kept in it
MOMENTS = 2  # of AdamW, each as large as the model
CHECKPOINTS = 2  # that a site keeps; one of them may be in the making
ORDERS = 2  # that a site works on: one runs, or is being taken by the server, and one is next


@dataclass(frozen=True)
class SiteDisk:
    """Bytes of a site's folder."""

    trained: int  # What orders have made that the server has not taken
    received: int  # Versions that orders start from
    checkpoints: int  # The optimizer's state
    feedback: int  # What a lossy codec has left out, before and after the last order

    @property
    def total(self) -> int:
        """All of it."""
        return self.trained + self.received + self.checkpoints + self.feedback


def site_disk(parameters: int, *, checkpoints: bool = True, feedback: bool = False) -> SiteDisk:
    """Return what a site keeps at most.

    Parameters
    ----------
    parameters : int
        Trained ones.
    checkpoints : bool
        Whether it writes any.
    feedback : bool
        Whether its codec has error feedback.
    """
    model = FLOAT32 * parameters
    payload = model // 2 if feedback else model  # bfloat16 is the largest
    written = CHECKPOINTS * MOMENTS * model
    return SiteDisk(ORDERS * payload, ORDERS * model, written * checkpoints, 2 * model * feedback)


def least_site_disk(parameters: int, *, checkpoints: bool = True) -> int:
    """Return the bytes without which a site cannot end a single order, whatever its codec.

    Those are a version, the optimizer's state and, under a lossy codec, what that leaves out; else
    the trained weights.
    """
    model = FLOAT32 * parameters
    return model + (1 + MOMENTS) * model * checkpoints


def server_disk(parameters: int, sites: int, kept: int) -> int:
    """Return what the run directory keeps at most.

    Two versions, what the strategy keeps beside them, and of each site a version that its order
    started from, a reply, and the reply before it, until the memory that maps it is freed.

    Parameters
    ----------
    parameters : int
        That are trained and travel.
    sites : int
    kept : int
        The strategy's `models_kept`.
    """
    return (2 + kept + 3 * sites) * FLOAT32 * parameters
