"""From rows to batches: buckets, the sampler, reader threads, the loader. May import `data.layouts` and `diffusion`."""
