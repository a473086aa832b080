"""How ranks share a model: replicas x shards x tensor ranks."""
