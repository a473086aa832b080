"""A batch system that lives outside of the package: what a newcomer would write."""
