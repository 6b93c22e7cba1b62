"""The docs are true: generated pages are up to date, code runs, and every name exists.

In a page, blocks of ```python run from top to bottom in one namespace, and an ```output block after
one is what it prints. ```console runs in a shell; the lines below a `$` line are printed in this
order. A fragment that cannot run by itself is ```py or ```sh.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT

from trainer.config.targets import resolve

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        *(ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "RELEASING")),
        *sorted(ROOT.glob("docs/*.md")),
        *sorted(ROOT.glob("docs/decisions/*.md")),
    ]
}
HOME = "/home/me/podlift"  # the folder that the pages show


def blocks(page):
    """(language, text) of each fenced block."""
    found = re.findall(r"^(`{3,})(\S*)[^\n]*\n(.*?)^\1$", PAGES[page], flags=re.M | re.S)
    return [(language, text) for _, language, text in found]


def pages_with(language, slow=()):
    return [
        pytest.param(page, marks=[pytest.mark.slow] if page in slow else [], id=page)
        for page in PAGES
        if any(found == language for found, _ in blocks(page))
    ]


def test_the_page_of_config_keys_is_up_to_date():
    """If not: `python docs/make_config_md.py`."""
    made = runpy.run_path(str(ROOT / "docs" / "make_config_md.py"))["render"]()
    assert PAGES["docs/config.md"] == made


def test_links_between_pages_lead_somewhere():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


# Code and commands run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with configs/, examples/, and a copy of the example's own files."""
    folder = tmp_path / "podlift"
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("runs", "__*"))
    shutil.copytree(folder / "examples" / "bring_your_own", folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    return folder


NUMBER = re.compile(r"(?<![\w/])-?\d+(?:[.,:]\d+)*(?:e[-+]?\d+)?")


def differences(shown, printed, *, numbers):
    """The lines of a page that are not printed in this order; `...` stands for any lines.

    With `numbers`, each number may differ by one unit of the last digit shown, and every printed
    line must be shown. Without, any number matches.
    """
    missing, left, skip = [], printed.strip().splitlines(), not numbers
    for line in shown.strip().splitlines():
        if line.strip() == "...":
            skip = True
            continue
        places = [place for place, other in enumerate(left) if agree(line, other, numbers=numbers)]
        if places and (skip or places[0] == 0):
            left = left[places[0] + 1 :]
        else:
            missing.append(line)
        skip = not numbers
    if left and not skip:
        missing.append(f"(printed and not shown:) {left[0]}")
    return missing


def agree(line, other, *, numbers):
    if NUMBER.sub("#", line).split() != NUMBER.sub("#", other).split():
        return False
    if not numbers and not line.startswith("exit code"):
        return True
    for a, b in zip(NUMBER.findall(line), NUMBER.findall(other), strict=True):
        unit = 10.0 ** -len(a.partition(".")[2]) if re.fullmatch(r"-?\d+\.\d+", a) else 0.0
        if a != b and not (unit and abs(float(a) - float(b)) < 1.5 * unit):
            return False
    return True


@pytest.mark.parametrize("page", pages_with("python", slow=["docs/tutorial.md"]))
def test_code_of_a_page_runs(page, here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    known = set(sys.modules)
    module = types.ModuleType("page")  # dataclasses look theirs up
    monkeypatch.setitem(sys.modules, "page", module)
    printed = ""
    try:
        for language, text in blocks(page):
            if language == "python":
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(compile(text, page, "exec", dont_inherit=True), vars(module))
                printed = out.getvalue()
            elif language == "output":
                assert not differences(text, printed, numbers=True), printed
    finally:
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(here)):
                del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("console"))
def test_commands_of_a_page_run(page, here, cache_dir):
    """In one shell, so that a page can use variables and background processes."""
    commands, expected = [], []
    for language, text in blocks(page):
        if language != "console":
            continue
        for line in text.splitlines():
            if line.startswith("$ "):
                commands.append(line[2:])
                expected.append("")
            elif commands[-1].endswith("\\"):
                commands[-1] += f"\n{line}"
            else:
                expected[-1] += f"{line}\n"
    ours = ("XLA_", "JAX_", "PJRT_", "PODLIFT_", "SLURM_", "OMPI_")
    done = subprocess.run(
        ["bash", "-c", "exec 2>&1\n" + "\n".join(f"{line}\necho '%%%'" for line in commands)],
        env={k: v for k, v in os.environ.items() if not k.startswith(ours)}
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache_dir),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        stdout=subprocess.PIPE,
        text=True,
        timeout=500,
    )
    printed = done.stdout.replace(str(here), HOME).split("%%%\n")
    assert len(printed) == len(commands) + 1, done.stdout
    for command, shown, text in zip(commands, expected, printed[:-1], strict=True):
        found = differences(shown, text, numbers=page == "docs/tutorial.md")
        assert not found, f"$ {command}\n{text}"


# Names exist


def named(pattern):
    """(page, match) for each match in any page."""
    return [(page, found) for page, text in PAGES.items() for found in re.findall(pattern, text)]


# From Flax's ImageNet example, or the reader's own.
NOT_OURS = {"configs/tpu.py", "configs/a.py", "configs/b.py", "examples/imagenet", "examples/s"}
NOT_OURS |= {"docs/_build"}  # made by Sphinx


def test_named_files_exist():
    rooms = "benchmarks|configs|docs|examples|launcher|scripts|tests|trainer"
    found = named(rf"(?<![\w./:-])((?:{rooms})/[\w./-]*\w)")
    assert len(found) > 100
    missing = [(p, name) for p, name in found if not (ROOT / name).exists()]
    assert [(page, name) for page, name in missing if name not in NOT_OURS] == []


def test_named_code_exists():
    found = named(r"\b((?:trainer|launcher|optax)(?:\.\w+)*:[A-Za-z_]\w*)")
    assert len(found) > 10
    for page, target in found:
        resolve(target, page)


def test_named_config_keys_exist():
    known = set()
    for spec in {spec for _, spec in named(r"configs/(\w+\.py(?::[a-z_]+)?)")}:
        known |= keys_of(ROOT / "configs", spec)
    known |= keys_of(ROOT / "examples" / "bring_your_own", "config.py")
    known |= {re.sub(r"\.\w+$", "", key) for key in known} | {
        key.partition(".")[0] for key in known
    }
    found = named(r"(?<![\w.])config\.([a-z_]+(?:\.[a-z_]+)*)\b(?![(/])")
    assert len(found) > 50
    files = {"json", "md", "py"}
    known |= {"optimizr.learning_rate"}  # a typo, on purpose
    assert [(page, key) for page, key in found if key not in known | files] == []


def keys_of(folder, spec):
    from trainer.config.keys import flatten
    from trainer.config.settings import check

    name, _, argument = spec.partition(":")
    if name == "from_json.py" or f"configs/{name}" in NOT_OURS:
        return set()
    get_config = runpy.run_path(str(folder / name))["get_config"]
    return set(flatten(check(get_config(*([argument] if argument else []))).config))


def test_quoted_messages_are_in_the_code():
    """A quoted message differs from one in the code only where the code fills in a value."""
    made = [text for path in ROOT.glob("[lt]*er/**/*.py") for text in strings_of(path)]
    for path in ROOT.glob("scripts/**/*.*"):
        for text in re.findall(r'fail "(.*?)"(?: |$)', path.read_text(), flags=re.M):
            made.append(re.split(r"\$\{?\w+\}?", text))
    made = [parts for parts in made if len(re.sub(r"\W", "", "".join(parts))) > 9]
    patterns = [re.compile(".*".join(map(re.escape, parts))) for parts in made]
    found = named(r"(?m)^ *(?:error|warning): (?!\w+Error on rank)(.*)")
    assert len(found) > 40
    assert [(p, line) for p, line in found if not any(m.fullmatch(line) for m in patterns)] == []


def strings_of(path):
    """The first line of each string of a file, split where a value is filled in."""
    tree = ast.parse(path.read_text())
    inside = {id(part) for node in ast.walk(tree) for part in getattr(node, "values", [])}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(
                getattr(part, "value", "") if isinstance(part, ast.Constant) else "\0"
                for part in node.values
            )
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
        ):
            text = node.value
        else:
            continue
        yield text.partition("\n")[0].split("\0")


# Flags of other programs that our scripts do not use.
FOREIGN = {
    "uv": "--extra --generate-hashes --no-annotate --no-header --python-version --system "
    "--universal",
    "pip": "--no-cache --no-cache-dir",
    "tensorboard": "--logdir",
    "torchrun": "--local-ranks-filter --log-dir --master-addr --max-restarts --nnodes --node-rank "
    "--nproc-per-node --rdzv-endpoint --standalone --tee",
    "squeue": "--me",
    "sbatch": "--array",
    "XLA": "--xla_cpu_experimental_ynn_fusion_type --xla_gpu_deterministic_ops",
    "tests/chaos": "--rounds --seed",
}


def test_named_flags_exist():
    defined = r'"(\w+)": \((?:absl_)?flags\.DEFINE_(\w+)'
    known = {"--config", "--flagfile", "--help"}
    for path in ROOT.glob("launcher/**/*.py"):
        for name, kind in re.findall(defined, path.read_text()):
            known |= {f"--{name}", f"--no{name}"} if kind == "bool" else {f"--{name}"}
    for path in ROOT.glob("scripts/**/*.*"):
        known |= set(re.findall(r"--[a-z][\w-]*", path.read_text()))
    for path in ROOT.glob("benchmarks/*.py"):
        known |= set(re.findall(r'add_argument\("(--[a-z][\w-]*)"', path.read_text()))
    known |= {flag for flags in FOREIGN.values() for flag in flags.split()}
    found = named(r"(?<![\w-])(--[a-z][\w-]*)")
    assert len(found) > 100
    assert [(page, flag) for page, flag in found if flag not in known] == []


def test_the_performance_page_quotes_the_recorded_figures():
    """If not: the results are newer than the page."""
    text = PAGES["docs/performance.md"]
    for name in ("step", "startup"):
        for row in json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())["rows"]:
            measured = [key for key in row if key.endswith("ms/step") or key == "total"]
            for key in measured if "/ bare" not in row.get("run", "") else ():
                shown = f"{row[key]:#.3g}".rstrip(".")
                assert f"| {shown} |" in text, (shown, row)
