"""The trainer, its options, and what a run survives. May import everything but `cli`."""
