"""The driver and the ServerApp."""
