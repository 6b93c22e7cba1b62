"""The run: `trainer.train`, its loop, and what is due after a step.

`train` is the public entry, `loop` the loop, `actions` what a run does when it is due (log,
evaluate, checkpoint, ...), `ownership` the agreement of all processes on the run's folder. `smoke`
tries every part once. Launchers use `train.train`, `smoke.smoke`, `profiling.Profile` and
`ownership.refuse_changes`; nothing else in `trainer` imports this room.
"""
