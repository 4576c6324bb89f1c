"""Caches that are read as they go by. May import `data.batches` and the readers of `data`."""
