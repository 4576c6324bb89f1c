"""Figures of merit: distances of distributions, restored images against sharp ones. May import `families`."""
