"""The loop, metrics, progress and traces."""
