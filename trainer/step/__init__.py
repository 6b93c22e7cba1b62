"""The program of one shard of a batch: the update step, the evaluation step, and their task.

It knows the other shards only by the name of an axis. Other rooms use `job.build_job` and
`job.make_init` (from settings to a `Job`), `task.Task`, `task.Recipe` and `task.AXIS`,
`update.make_update_step`, `evaluate.make_eval_step`, `init.init_state`, and `analysis` (FLOPs and
other properties of a step, without running it).
"""
