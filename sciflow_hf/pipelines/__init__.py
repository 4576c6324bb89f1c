"""Pipelines of those networks; saved ones carry their code. May import `diffusion`, `images` and `errors`."""
