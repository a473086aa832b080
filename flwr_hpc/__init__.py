"""Train one language model across several supercomputing centres with Flower."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr_hpc.batch_mod.mod import batch

__all__ = ["__version__", "batch"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "batch":  # only for those who use it: it imports Flower
        from flwr_hpc.batch_mod.mod import batch

        return batch
    raise AttributeError(f"module 'flwr_hpc' has no attribute '{name}'")
