"""Lets this process make Flower messages.

Flower 1.41 makes messages only in processes it has started itself: its constructor asks for the
task, run and node it works for, and there is no public way to set them. This is the only place
that reaches behind the public API; a test holds it against the installed Flower.
"""

from __future__ import annotations

from typing import Any

from flwr.app import Message


def take_identity() -> None:
    """Do what Flower does when it starts a process.

    Raises
    ------
    RuntimeError
        If this Flower keeps the identity elsewhere.
    """
    constructor: Any = Message.__init__
    identity = getattr(constructor, "__globals__", {}).get("TaskIdentity")
    if identity is None:
        raise RuntimeError("this version of Flower keeps its identity elsewhere; 1.41 is known")
    identity.task_id, identity.run_id, identity.node_id = 1, 1, 1
