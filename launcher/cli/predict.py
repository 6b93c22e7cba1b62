"""`python -m launcher predict`: a model's outputs for every example, as a NumPy file."""

from __future__ import annotations

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
from trainer.errors import UserError
from trainer.workdir.paths import absolute, opened_whole

HELP = f"""\
Writes the outputs of a trained model for every example of a data set, in order, in one process on
any number of devices.

  python -m launcher predict --workdir=runs/digits --step=best --out=outputs.npz

{WHICH_STATE}\
  --out=FILE.npz         arrays with one row per example: outputs, or outputs/NAME if the model
                         returns a dict, and y if the data has it
  --split=eval           the held-out examples; train: the training examples, in their order and
                         without augmentation
  --fake_devices=M       M virtual CPU devices
  --help                 prints this text

{EXIT_CODES}"""

_FLAGS: Flags = {
    **FAKE_DEVICES,
    "out": (absl_flags.DEFINE_string, None, None),
    "split": (absl_flags.DEFINE_string, "eval", None),
}


def main(argv: Sequence[str]) -> int:
    """Runs `python -m launcher predict`; returns the exit code.

    Args:
        argv: the arguments after `predict`.
    """
    return run(argv, HELP, _predict)


def _predict(argv: Sequence[str]) -> None:
    request = read_request("predict", argv, _FLAGS)
    file, split = request.flags["out"], request.flags["split"]
    if not file:
        raise UserError("--out is missing", "for example --out=outputs.npz")
    if split not in ("eval", "train"):
        raise UserError(f"--split={split} is neither eval nor train")
    check_writable("out", file)
    trained, lift = open_model(request, request.flags["fake_devices"])
    import numpy as np

    from trainer.console import say
    from trainer.inference.predict import predict_trained

    arrays = predict_trained(trained, lift, split)
    with writing(file), opened_whole(absolute(file)) as out:
        np.savez(out, **arrays)  # type: ignore[arg-type]
    shown = ", ".join(f"{n} {a.dtype}[{','.join(map(str, a.shape))}]" for n, a in arrays.items())
    say(f"wrote {file}: {shown}")
