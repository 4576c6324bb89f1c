"""Microscope images: files, intensities, optics, tiles. Knows no model family and no trainer."""
