"""Caches of latents and text embeddings, buckets and loaders; knows no model family."""
