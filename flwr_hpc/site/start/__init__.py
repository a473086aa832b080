"""ClientApps that start as forks of one warm process."""
