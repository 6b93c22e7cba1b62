"""The table of commands. A new command is a module with `main(argv) -> int`, and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast


class Command(NamedTuple):
    """A command of `python -m launcher`.

    Attributes:
        name: what a user types.
        module: defines `main(argv: Sequence[str]) -> int`, which takes the arguments after the
            name and returns the exit code. Imported when the command runs, not before.
        summary: one line for --help.
    """

    name: str
    module: str
    summary: str

    def main(self) -> Callable[[Sequence[str]], int]:
        """Imports the module; returns its `main`."""
        main = importlib.import_module(self.module).main
        return cast(Callable[[Sequence[str]], int], main)


# The first one is the default: it runs when the arguments name no command.
COMMANDS = (
    Command("train", "launcher.cli.train", "trains (the default: the name may be left out)"),
    Command("eval", "launcher.cli.evaluate", "a saved state on the held-out data, on any devices"),
    Command("predict", "launcher.cli.predict", "the model's outputs for a data set, as a file"),
    Command("export", "launcher.cli.export", "the trained model as a file that needs only jax"),
    Command("report", "launcher.cli.report", "runs as one page of HTML: curves, config, failures"),
    Command(
        "plan", "launcher.cli.plan", "does it fit a TPU or GPU topology, how fast: without one"
    ),
    Command("env", "launcher.cli.env", "versions, devices and variables, for a bug report"),
)
NAMES = tuple(command.name for command in COMMANDS)


def find_command(argv: Sequence[str]) -> tuple[Command, Sequence[str]]:
    """The command that arguments name, and the arguments without its name."""
    for command in COMMANDS:
        if argv[:1] == [command.name]:
            return command, argv[1:]
    return COMMANDS[0], argv
