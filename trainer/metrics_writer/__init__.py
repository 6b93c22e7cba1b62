"""What a run reports: console lines, `metrics.jsonl`, TensorBoard and the live view.

`run_log.RunLog` is the door for a run's own reports; `step_metrics.StepMetrics` reads the metrics
of dispatched steps, and `goodput.Goodput` counts where the time goes. `messages` holds the printed
lines. Launchers also use `metrics_file.read_metrics_file` and `chip_peaks`, which import no jax.
"""
