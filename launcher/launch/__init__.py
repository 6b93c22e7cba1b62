"""What a run launches, decided before jax is imported and before anything starts.

`build.make_launch_spec` turns options, config and the scheduler's variables into a
`spec.LaunchSpec`; `dry_run` prints one, `smoke` makes one of a smoke test, `environment` prepares
the variables that jax reads, and `workers.count_gpus` counts GPUs without CUDA.
"""
