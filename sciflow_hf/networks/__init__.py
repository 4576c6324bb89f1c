"""Networks that diffusers lacks, one file each, to travel with the weights. May import nothing of the project."""
