"""report.html and summary.json: one self-contained page about a run."""
