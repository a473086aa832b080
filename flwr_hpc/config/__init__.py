"""The configuration: its schema, what it may hold, and how it is composed."""
