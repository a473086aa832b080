"""Where a site's training has got, and what keeps it on disk."""
