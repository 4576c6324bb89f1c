"""How a network runs, with the options of each engine. May import errors, files, options and diffusion."""
