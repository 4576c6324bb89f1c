"""The mathematics of noising and denoising: torch only, no project imports."""
