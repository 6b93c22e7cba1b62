"""One command for each kind of check: `nox -s lint`, `test`, `docs`, `bench`.

The scripts set up .venv at the versions of requirements.lock, so a session makes no environment.
"""

import os
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "test"]
BIN = Path(os.environ.get("PODLIFT_VENV", ".venv")) / "bin"


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, imports between rooms, shell scripts, docs."""
    session.run("scripts/lint.sh")


@nox.session
def test(session: nox.Session) -> None:
    """The tests: `nox -s test -- --fast tests/step`."""
    session.run("scripts/test.sh", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The pages, in docs/_build."""
    session.run("scripts/setup.sh")
    session.run(str(BIN / "sphinx-build"), "-W", "-q", "docs", "docs/_build", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """One benchmark: `nox -s bench -- step --help`; by default the time of a step."""
    name, *arguments = session.posargs or ["step"]
    session.run("scripts/setup.sh")
    session.run(str(BIN / "python"), f"benchmarks/{name}.py", *arguments)
