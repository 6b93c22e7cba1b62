"""One process of a run, the only part of the launcher that imports jax.

`run.run_here` trains in the launcher's own process; `python -m launcher.worker` (`run.main`) is a
process that a supervisor starts. `join` connects it to its peers, `mesh.build_mesh` orders the
devices of the job on one axis (`mesh.order_devices` without jax's backends), and `exchange` makes
sums between two CPU processes faster.
"""
