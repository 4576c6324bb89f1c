"""Figures of merit of samples: distances of distributions, and of restored images to sharp ones."""
