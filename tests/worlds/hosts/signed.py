"""Requests to Flower's Fleet API that are signed as a SuperNode signs them, or almost."""

from __future__ import annotations

import base64
import http.client
import ssl
import struct
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node

HEARTBEAT = "/v1/fleet/send-node-heartbeat"
PUSH = "/v1/fleet/push-messages"
INTERVAL_S = 30.0


@dataclass(frozen=True)
class Signer:
    """Who has a private key, and says that it goes with a public one."""

    private_ssh: str
    public_pem: str

    def headers(self, age_s: float = 0.0, said_age_s: float | None = None) -> dict[str, str]:
        """Return what shows who one is, signed so long ago; `said_age_s`: as one says."""
        key = load_ssh_private_key(self.private_ssh.encode(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        signature = key.sign(_time(age_s).encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": _text(self.public_pem.encode()),
            "flwr-timestamp": _time(age_s if said_age_s is None else said_age_s),
            "flwr-signature": _text(signature),
            "content-type": "application/protobuf",
        }


def heartbeat(port: int, headers: dict[str, str], node_id: int) -> int:
    """Say at a port of this host that a node lives; return the answer's status."""
    return _ask(port, HEARTBEAT, _heartbeat(node_id), headers)[0]


def reply(
    port: int, headers: dict[str, str], node_id: int, source: int, run_id: int
) -> tuple[int, str]:
    """Reply as a node, in the name of `source`; return the answer's status and text."""
    return _ask(port, PUSH, reply_body(node_id, source, run_id), headers)


def reply_body(node_id: int, source: int, run_id: int) -> bytes:
    """Return a request with a reply to a message that nobody has sent."""
    metadata = Metadata(
        run_id=run_id, src_node_id=source, dst_node_id=1, reply_to_message_id="0" * 64,
        message_id="1" * 64, message_type="train", created_at=time.time(), ttl=60.0,
    )  # fmt: skip
    return bytes(
        PushMessagesRequest(
            node=Node(node_id=node_id),
            messages_list=[Message(metadata=metadata)],
            message_object_trees=[ObjectTree(object_id="1" * 64)],
        ).SerializeToString()
    )


def _ask(port: int, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
    context = ssl._create_unverified_context()
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=60)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


def _heartbeat(node_id: int) -> bytes:
    """Return the protobuf message: a node with its number, and the interval."""
    node = b"\x08" + _varint(node_id)
    return b"\x0a" + _varint(len(node)) + node + b"\x11" + struct.pack("<d", INTERVAL_S)


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _time(age_s: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat(timespec="seconds")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
