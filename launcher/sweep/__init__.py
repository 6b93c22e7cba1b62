"""`--sweep`: runs every variant that `get_sweep()` of a config file yields, without importing jax.

`sweep.run_sweep` starts each variant as a command of its own through `foreground`; `table` collects
the results, prints them and writes `sweep.json`. `command_line.variants` reads the variants.
"""
