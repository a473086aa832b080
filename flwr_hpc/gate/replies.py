"""Replies of a site's SuperNode: in its own name, and in no other.

Flower looks at whose key has signed a request, and that the node which the request names is that
key's; not at the node that the messages in it say they come from, by which a reply is counted.
"""

from __future__ import annotations

from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError


def in_own_name(body: bytes) -> bool:
    """Whether all messages come from the node that the request names, which Flower checks."""
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    node = request.node.node_id
    return all(message.metadata.src_node_id == node for message in request.messages_list)
