"""How a network runs: sharded, compiled, offloaded, quantised; optimizers. May import `errors` and `options`."""
