"""`python -m launcher export`: a trained model as a file that needs only jax."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Sequence

from absl import flags as absl_flags

from launcher.cli.finished_run import (
    EXIT_CODES,
    WHICH_STATE,
    check_writable,
    read_model,
    read_request,
    run,
    writing,
)
from launcher.cli.run_command import CommandFailed
from launcher.command_line.parse import Flags
from launcher.launch import environment
from launcher.processes import user_errors
from trainer.config import trust
from trainer.console import say
from trainer.errors import UserError
from trainer.workdir.paths import absolute, opened_whole

HELP = f"""\
Exports a trained model, with its parameters and state, as one jax.export program: a function of x,
for any number of examples, that needs neither flax nor podlift nor the model's code.

  python -m launcher export --workdir=runs/digits --step=best --out=digits.jax

{WHICH_STATE}\
  --out=FILE             jax.export.deserialize(open(FILE, "rb").read()).call(x) runs it
  --platforms=cpu,cuda,tpu
                         the platforms it runs on; also rocm
  --batch=N              for N examples only, if the model depends on the number of examples
  --example=SHAPES       exports without the data: "x=uint8[224,224,3]", for one example
  --help                 prints this text

{EXIT_CODES}"""

_FLAGS: Flags = {
    "out": (absl_flags.DEFINE_string, None, None),
    "platforms": (absl_flags.DEFINE_string, "cpu,cuda,tpu", None),
    "batch": (absl_flags.DEFINE_integer, None, 1),
    "example": (absl_flags.DEFINE_string, None, None),
}
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def main(argv: Sequence[str]) -> int:
    """Runs `python -m launcher export`; returns the exit code.

    Args:
        argv: the arguments after `export`.
    """
    return run(argv, HELP, _export)


def _export(argv: Sequence[str]) -> None:
    request = read_request("export", argv, _FLAGS)
    file, batch, example = (request.flags[name] for name in ("out", "batch", "example"))
    if not file:
        raise UserError("--out is missing", "for example --out=model.jax")
    check_writable("out", file)
    platforms = _platforms(request.flags["platforms"])
    if (
        importlib.util.find_spec("flatbuffers") is None
    ):  # jax.export needs it but does not install it
        raise UserError("flatbuffers is not installed", 'pip install "podlift[export]"')
    if example is not None:
        from launcher.planning.example import in_place_of_data

        settings = in_place_of_data(request.settings, example)
        trust.allow(settings.data["target"])
        request = dataclasses.replace(request, settings=settings)
    # Nothing is executed, and a training run may hold the accelerators.
    os.environ["JAX_PLATFORMS"] = "cpu"
    environment.prepare(os.environ, None)
    trained = read_model(request)
    from trainer.inference.export import export_model, signature

    try:
        exported = export_model(trained, platforms, batch)
        data = exported.serialize()
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a user's model raises when traced
        sizes = "any number of examples" if batch is None else f"{batch} examples"
        what = f"the model cannot be exported for {sizes} on {', '.join(platforms)}"
        hint = "--batch=N exports it for N examples only, --platforms=NAME for one platform"
        if isinstance(error, NameError) and "axis" in str(error):
            hint = "with train=False a model must not need the other examples of its batch"
        raise CommandFailed(user_errors.describe(what, error, os.environ, hint)) from error
    with writing(file), opened_whole(absolute(file)) as out:
        out.write(data)
    say(f"wrote {file}: {signature(exported)} on {', '.join(platforms)}, {_size(len(data))}")


def _platforms(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in _PLATFORMS:
            near = difflib.get_close_matches("cuda" if name == "gpu" else name, _PLATFORMS, n=1)
            raise UserError(
                f"--platforms: there is no {name!r}",
                f"did you mean {near[0]}?" if near else f"there are {', '.join(_PLATFORMS)}",
            )
    return names


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
