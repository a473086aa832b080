"""Replies of a site's SuperNode: in its own name, and in no other.

Flower looks at whose key has signed a request, and that the node which the request names is that
key's; not at the node that the messages in it say they come from, by which a reply is counted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

PUSH = b"/v1/fleet/push-messages"


async def read_body(receive: Receive) -> bytes | None:
    """Return a request's body, whose length is limited; None if its sender has gone."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def in_own_name(body: bytes) -> bool:
    """Whether all messages come from the node that the request names, which Flower checks."""
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    node = request.node.node_id
    return all(message.metadata.src_node_id == node for message in request.messages_list)


def once_more(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that has been read, and then whatever comes."""
    given = False

    async def received() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return received
