"""Data sets of pixels: images with classes, microscopes. May import `data` and `diffusion`; no model family."""
