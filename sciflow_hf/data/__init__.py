"""Caches of latents and text embeddings: layouts, builds, batches, streams. May import `diffusion`; no model family."""
