"""What a strategy subclasses."""
