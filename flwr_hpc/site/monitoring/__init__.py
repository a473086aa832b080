"""What becomes of a site's jobs: the scheduler's word and the workers', brought together."""
