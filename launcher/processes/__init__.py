"""What a launcher and its workers share: what passes between them, and how they wait and report.

`assignment` (a worker's `Assignment` and `Outcome`), `progress_page.ProgressPage`, `failure`
(`Failure`, `failure.json`), `event_loop.EventLoop`, `signals` (being asked to stop), `rank_log`
(`logs/attempt-K/rank-R.log`), `messages` (the launcher's terminal) and `user_errors.describe`.
Nothing here imports jax before a worker has started.
"""
