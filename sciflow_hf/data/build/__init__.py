"""Making caches: from images, or from other caches. May import `data.layouts` and the readers of `data`."""
