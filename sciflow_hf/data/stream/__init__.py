"""Caches that are read row by row. May import `data.batches`, `data.layouts` and the readers of `data`."""
