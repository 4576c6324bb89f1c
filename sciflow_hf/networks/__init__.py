"""Networks that diffusers lacks: torch and diffusers only, one file each, so that the file can go with its weights."""
