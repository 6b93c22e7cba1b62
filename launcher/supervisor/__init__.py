"""Runs the workers of a launch, and starts them again after a failure.

`supervise.supervise` runs a `LaunchSpec` to its end; everything else serves it: `attempt` (the
workers once, from start to end), `children` (worker processes), `watchdog` (who has stopped making
progress), `failures` (what the launcher itself reports) and `restarts` (what is worth another
attempt). This process never imports jax, so it starts at once and survives a worker's runtime.
"""
