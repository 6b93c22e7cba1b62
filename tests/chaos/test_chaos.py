"""Twenty seeded chaos rounds, and one that cannot be recovered. See `rounds`."""

from __future__ import annotations

import fcntl
import os

import checks
import pytest
from conftest import skip_here
from rounds import Place, make_reference, run_round, why_no_disk
from script import HOPELESS, KINDS, PATIENCE_KINDS, draw

SEED = 1
SCRIPTS = [draw(SEED, number) for number in range(20)]
FILL = skip_here(why_no_disk())

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that the xdist workers of this session share."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return tmp_path_factory.getbasetemp().parent / "chaos"
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="session")
def reference(shared, cache_dir):
    """The results of the undisturbed run, which the first worker that needs it runs for all."""
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        workdir = shared / "reference" / "run"
        if not (shared / "reference-is-there").exists():
            make_reference(Place(shared, cache_dir))
            (shared / "reference-is-there").touch()
    return checks.read(workdir)


def run_and_check(script, reference, tmp_path, cache_dir):
    result = run_round(script, Place(tmp_path, cache_dir), reference)
    text = "\n".join([*result.done, *result.problems])
    kind = f" --kind={script.kind}" if script.kind in (*PATIENCE_KINDS, HOPELESS) else ""
    again = f"python tests/chaos --seed={script.seed} --round={script.number}{kind}"
    assert not result.problems, f"{text}\nin {result.folder}\nagain: {again}"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(s, id=f"{s.number}-{s.kind}", marks=[FILL] if s.kind == "fill" else [])
        for s in SCRIPTS
    ],
)
def test_a_disturbed_run_has_the_results_of_an_undisturbed_one(
    script, reference, tmp_path, cache_dir
):
    run_and_check(script, reference, tmp_path, cache_dir)


@pytest.mark.parametrize("kind", ["suspend", "late"])
def test_a_run_waits_and_does_not_restart(kind, reference, tmp_path, cache_dir):
    """A step of the clock is in tests/jobs/test_failed_ranks.py."""
    run_and_check(draw(SEED, 0, kind), reference, tmp_path, cache_dir)


def test_all_checkpoints_damaged(tmp_path, cache_dir):
    """The run stops, says why, and deletes nothing."""
    run_and_check(draw(SEED, 0, HOPELESS), None, tmp_path, cache_dir)


def test_every_kind_has_its_rounds():
    assert {script.kind for script in SCRIPTS} == set(KINDS)
    assert [draw(SEED, number) for number in range(len(SCRIPTS))] == SCRIPTS
