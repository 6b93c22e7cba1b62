"""Models: Flax Linen modules, each written for one chip."""
