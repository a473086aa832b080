"""What simulated sites learn: a small network, a small transformer on text, or a formula."""
