"""The order machine under every strategy."""
