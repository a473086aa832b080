"""What strategies are made of: pure rules, and small objects with state."""
