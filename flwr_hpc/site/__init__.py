"""A facility's login node: the ClientApp and the allocations it manages."""
