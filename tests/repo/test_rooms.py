"""What the rooms promise and import-linter cannot see; its contracts are in setup.cfg."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

SOURCES = sorted(
    path for package in ("launcher", "trainer") for path in (ROOT / package).rglob("*.py")
)
FOLDERS = ("launcher", "trainer", "configs", "examples", "benchmarks", "docs", "tests", "scripts")
MOST_LINES = 400

# Where each of jax's names for devices and processes may stand: a module, or a room.
ONLY_IN = {
    "pmap": ["trainer.lift"],
    "shard_map": ["trainer.lift"],
    "distributed": ["launcher.worker"],
    # jax agrees on a preemption among processes there; no array crosses.
    "multihost_utils": ["trainer.lift", "launcher.processes.signals"],
}

# A mistyped flag is answered from these, before jax is imported.
LIGHT = ["launcher.__main__", "launcher.cli", "launcher.command_line", "launcher.launch"]
LIGHT += ["launcher.clusters", "launcher.processes", "launcher.supervisor", "launcher.rendezvous"]
LIGHT += ["launcher.report", "launcher.sweep", "launcher.exit_codes"]
LIGHT += ["trainer.config", "trainer.workdir", "trainer.errors", "trainer.console"]
HEAVY = ["flax", "jax", "optax", "orbax", "tensorboardX"]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_in(module, rooms):
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def names_in(source):
    """The names that a module's code reads from others: of attributes and of imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for name in [getattr(node, "module", None) or "", *(a.name for a in node.names)]:
                yield from name.split(".")


@pytest.mark.parametrize("name", ONLY_IN)
def test_only_its_room_names_what_lays_a_step_over_devices(name):
    elsewhere = [
        module_of(path)
        for path in SOURCES
        if not is_in(module_of(path), ONLY_IN[name]) and name in names_in(path.read_text())
    ]
    assert not elsewhere


def test_only_the_console_prints():
    """It shows control characters instead of obeying them, and survives a closed stream."""
    printers = [
        module_of(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert set(printers) == {"trainer.console"}


def test_what_runs_before_the_flags_are_checked_imports_nothing_heavy():
    """Modules are imported for real: import-linter cannot tell an import inside a function."""
    modules = [module_of(path) for path in SOURCES if is_in(module_of(path), LIGHT)]
    assert len(modules) > 40
    code = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = sys.modules.keys() & set({HEAVY})\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_too_long_to_read_in_one_go(folder):
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long


def test_every_room_says_what_it_is_for():
    folders = {path.parent for path in SOURCES}
    silent = [
        str(folder.relative_to(ROOT))
        for folder in sorted(folders)
        if not (folder / "__init__.py").exists()
        or not ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    ]
    assert not silent


def test_every_test_file_has_a_name_of_its_own():
    """They are imported by that name alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
