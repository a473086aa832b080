"""What a run keeps on disk at its peak, by arithmetic on the model's size.

Upper bounds: hard links are counted on only where every file system of a facility has them. Not in
them are prepared data, and what a strategy keeps besides (a variate, gathered updates).
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32 = 4  # bytes: what travels and is trained is kept in it
MOMENTS = 2  # of AdamW, each as large as the model
CHECKPOINTS = 2  # that a site keeps; one of them may be in the making


@dataclass(frozen=True)
class SiteDisk:
    """Bytes of a site's folder."""

    trained: int  # Weights of the order at work; those of earlier ones are in checkpoints
    received: int  # Versions that the order at work and the next one start from
    checkpoints: int  # Weights and the optimizer's state
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
    written = CHECKPOINTS * (1 + MOMENTS) * model
    return SiteDisk(model, 2 * model, written * checkpoints, 2 * model * feedback)


def least_site_disk(parameters: int, *, checkpoints: bool = True) -> int:
    """Return the bytes without which a site cannot end a single order: a version, a checkpoint."""
    model = FLOAT32 * parameters
    return model + (1 + MOMENTS) * model * checkpoints


def server_disk(parameters: int, sites: int) -> int:
    """Return what the run directory keeps at most.

    Two versions with the outer optimizer's state, and of each site a version that its order
    started from, a reply, and the reply before it, until the memory that maps it is freed.
    """
    return (4 + 3 * sites) * FLOAT32 * parameters
