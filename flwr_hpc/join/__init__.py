"""A centre's part in a run whose server is elsewhere."""
