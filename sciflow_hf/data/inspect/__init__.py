"""Looking at caches: verify, check again, repair, describe, draw. May import all of `data`."""
