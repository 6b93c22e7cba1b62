"""The table of commands."""

import importlib.util

import pytest

from launcher.cli.commands import COMMANDS, find_command
from launcher.cli.train import HELP


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_a_module_with_main(command):
    assert importlib.util.find_spec(command.module)
    assert callable(command.main())


def test_the_help_lists_every_other_command():
    for command in COMMANDS[1:]:
        assert f"python -m launcher {command.name} " in HELP
        assert command.summary in HELP
    assert max(map(len, HELP.splitlines())) <= 100


def test_training_is_the_default_and_has_a_name():
    flags = ["--config=configs/mlp.py", "--smoke"]
    assert find_command(flags) == (COMMANDS[0], flags)
    assert find_command(["train", *flags]) == (COMMANDS[0], flags)
    assert find_command(["eval", "--step=3"])[0].name == "eval"
    assert find_command([]) == (COMMANDS[0], [])
