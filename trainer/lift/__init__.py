"""Runs a per-shard function on devices and processes.

This is the only room that names `jax.pmap`, `jax.shard_map` or the process boundaries of arrays.
Other rooms use `lift.make_lift` and `lift.Lift` (compile a function, place arrays, read them back,
communicate between processes), `update.lift_update_step` (the compiled step of a run),
`call.Call` (the steps of one call), `replicas.check_replicas`, `same_data.agree_on_data`,
`unsynced.unsynced_state` and `in_flight.InFlight`.
"""
