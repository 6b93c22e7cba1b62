"""`--sweep` and `--sweep_index`: the runs that `get_sweep()` of a config file yields.

`variant` (which runs there are) -> `run` (one after the other, each a command of its own, by way of
`foreground`) -> `table` (what came of them). Nothing here imports jax.
"""
