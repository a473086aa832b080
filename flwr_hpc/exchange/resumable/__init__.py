"""Transfers that go on where they were cut, over whatever line."""
