"""How tensors lie in files, one file a layout: npz, shards, inline. May import the readers and `writing` of `data`."""

PAYLOADS = ("npz", "shards", "inline")
"""Layouts of a cache's tensors."""
EMBEDS = ("bf16", "fp8", "none")
"""How text embeddings are stored in shards and inline files."""
CODECS = ("none", "zstd")
"""Their compression."""
