"""`python -m launcher eval`: the metrics of a saved state, as training computes them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from absl import flags as absl_flags

from launcher.cli.finished_run import (
    EXIT_CODES,
    FAKE_DEVICES,
    WHICH_STATE,
    check_writable,
    open_model,
    read_request,
    run,
    writing,
)
from launcher.command_line.parse import Flags
from trainer.workdir.paths import absolute, write_whole

HELP = f"""\
Evaluates a saved state of a run on its held-out data, in one process, on any number of devices.

  python -m launcher eval --workdir=runs/digits --step=best

{WHICH_STATE}\
  --fake_devices=M       M virtual CPU devices
  --json=FILE            writes the metrics for programs
  --help                 prints this text

{EXIT_CODES}"""

_FLAGS: Flags = {**FAKE_DEVICES, "json": (absl_flags.DEFINE_string, None, None)}


def main(argv: Sequence[str]) -> int:
    """Runs `python -m launcher eval`; returns the exit code.

    Args:
        argv: the arguments after `eval`.
    """
    return run(argv, HELP, _evaluate)


def _evaluate(argv: Sequence[str]) -> None:
    request = read_request("eval", argv, _FLAGS)
    file = request.flags["json"]
    check_writable("json", file)
    trained, lift = open_model(request, request.flags["fake_devices"])
    from trainer.inference.evaluate import evaluate_trained
    from trainer.metrics_writer.messages import say_evaluation

    metrics = evaluate_trained(trained, lift)
    say_evaluation(trained.step, trained.job.stop, metrics)
    if file is not None:
        device = lift.mesh.devices.flat[0]
        found = {
            "step": trained.step,
            "checkpoint": str(trained.place),
            "examples": len(trained.examples("eval")),
            "devices": {"count": lift.mesh.size, "kind": device.device_kind},
            "metrics": {n: v if math.isfinite(v) else None for n, v in metrics.items()},
        }
        with writing(file):
            write_whole(absolute(file), json.dumps(found, indent=2) + "\n")
