"""From a facility to jobs: rendering, submitting, watching, and an allocation's life."""
