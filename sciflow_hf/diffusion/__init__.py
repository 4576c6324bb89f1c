"""The mathematics of noising and denoising: torch only. May import nothing of the project."""
