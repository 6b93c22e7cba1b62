"""What an in-memory checkpoint costs training.

    python benchmarks/copies.py [--model=resnet] [--batch=256] [--devices=8] [--seconds=60]

One run saves in memory more often than the default, for more samples. The cost of a checkpoint is
the time of the steps from its start to the end of its writing, minus the time of as many steps
around them. It includes the wait for the devices, the copy to the host and the CPU time of the
writing thread. The share of training time divides it by the default
`config.checkpoint.fast_every_secs`, 5 seconds.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

from frame import fake_devices, parser_of, write_and_print

EVERY_SECS, DEFAULT_EVERY_SECS = 4.0, 5.0
AROUND = 20  # steps on each side of a checkpoint, for comparison


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="resnet", choices=("resnet", "mlp"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    fake_devices(options.devices)
    write_and_print(measure(options.model, options.batch, options.seconds), options.out)


def measure(model: str, batch: int, seconds: float) -> dict[str, object]:
    import jax

    import trainer
    from configs.digits import get_config
    from trainer.checkpoints.in_memory import InMemoryCheckpoints

    copies: list[tuple[float, float, int]] = []  # start, end of writing, bytes
    save, write = InMemoryCheckpoints.save, InMemoryCheckpoints._write

    def timed_save(self, step, meta, arrays, blocked):
        copies.append((time.monotonic() - blocked, 0.0, sum(a.nbytes for a in arrays.values())))
        save(self, step, meta, arrays, blocked)

    def timed_write(self, job):
        write(self, job)
        began, _, size = copies[-1]
        copies[-1] = (began, time.monotonic(), size)

    InMemoryCheckpoints.save, InMemoryCheckpoints._write = timed_save, timed_write
    ends: list[float] = []  # of each step, as the loop dispatches it
    deadline = [float("inf")]

    def stop_requested(step: int, phase: str) -> bool:
        if phase == "train":
            ends.append(time.monotonic())
            if len(ends) == 20:
                deadline[0] = ends[-1] + seconds
        return bool(ends) and ends[-1] > deadline[0]

    config = get_config(model)
    config.global_batch_size = batch
    config.num_steps = 1_000_000
    config.log_every_steps = 1_000_000
    config.checkpoint.every_steps = 1_000_000
    config.checkpoint.fast_every_secs = EVERY_SECS
    config.eval = {"every_steps": 1_000_000}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(trainer.Preempted):
        trainer.train(config, Path(folder) / "run", stop_requested=stop_requested)
    return summary(ends[20:], copies, jax.__version__, batch, model)


def summary(ends, copies, version, batch, model) -> dict[str, object]:
    """The extra time of the steps beside a checkpoint, against the steps before and after."""
    from trainer.lift.in_flight import MAX_IN_FLIGHT

    costs, steps = [], []
    for began, written, _ in copies:
        places = [i for i in range(1, len(ends)) if ends[i] >= began and ends[i - 1] <= written]
        if not places or not written:
            continue
        # The wait for the devices drains the queue of steps, so the next ones dispatch faster.
        first, last = places[0], places[-1] + 2 * MAX_IN_FLIGHT
        if first <= AROUND or last + AROUND >= len(ends):
            continue
        before = ends[first - 1] - ends[first - 1 - AROUND]
        after = ends[last + AROUND] - ends[last]
        step = (before + after) / (2 * AROUND)
        steps.append(step)
        costs.append(ends[last] - ends[first - 1] - step * (last - first + 1))
    step = statistics.fmean(steps)
    cost = statistics.fmean(costs)
    return {
        "model": model,
        "global_batch_size": batch,
        "jax": version,
        "state_bytes": copies[0][2],
        "copies": len(costs),
        "step_seconds": step,
        "seconds_a_copy": cost,
        "seconds_a_copy_standard_error": statistics.stdev(costs) / len(costs) ** 0.5,
        "percent_of_time_at_the_default": 100 * cost / DEFAULT_EVERY_SECS,
    }


if __name__ == "__main__":
    main()
