"""Jobs on this host."""
