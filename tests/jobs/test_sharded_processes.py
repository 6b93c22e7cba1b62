"""A state that is sharded over several processes on one machine: same numbers, restarts, damage."""

from __future__ import annotations

import os
import signal

import pytest
from conftest import wide
from job_helpers import TWO, alone, assert_same_state, begin, reference, rows_of, run, worker_of
from runs import flip_a_bit, save_another_state, truncate

__all__ = ["alone", "begin", "run"]  # fixtures

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("first", "then"), [wide("fsdp", "zero1"), pytest.param("zero1", "fsdp", marks=slow)]
)
def test_a_state_sharded_over_processes(run, alone, tmp_path, first, then):
    wide = ["--config.num_steps=6", "--config.model.hidden_size=64"]
    wide += ["--config.optimizer.target=optax:adagrad", "--config.checkpoint.every_steps=2"]
    expected = reference(alone, run, "--fake_devices=4", *wide)
    two = [*TWO, *wide, "--config.lift=shard_map"]
    code, out, err = run(
        tmp_path / "run", *two, f"--config.state_sharding={first}", "--config.stop_at_step=4"
    )
    assert code == 0, out + err
    code, out, err = run(tmp_path / "run", *two, f"--config.state_sharding={then}")
    assert code == 0, out + err
    assert "restored step 4" in out
    assert_same_state(tmp_path / "run", expected, atol=1e-5)
    assert rows_of(tmp_path / "run")[-1]["eval/loss"] == pytest.approx(
        rows_of(expected)[-1]["eval/loss"], abs=1e-5
    )


def sharded(kind):
    """Flags of a model of which some leaves are sharded."""
    wide = ["--config.model.hidden_size=64", "--config.optimizer.target=optax:adagrad"]
    return [*wide, "--config.lift=shard_map", f"--config.state_sharding={kind}"]


@pytest.mark.slow
def test_a_sharded_state_resumes_with_other_processes_and_another_sharding(run, alone, tmp_path):
    expected = reference(alone, run, "--fake_devices=4", *sharded("replicated"))
    layouts = [
        (["--processes=4"], "fsdp"),
        (TWO, "zero1"),
        (["--fake_devices=4"], "fsdp"),
        (["--processes=2", "--fake_devices=4"], "fsdp"),
        (["--fake_devices=2"], "replicated"),
    ]
    for number, (layout, kind) in enumerate(layouts):
        stop = f"--config.stop_at_step={8 * (number + 1)}"
        code, out, err = run(tmp_path / "run", *layout, *sharded(kind), stop)
        assert code == 0, out + err
        assert (f"restored step {8 * number}" in out) == (number > 0)
    assert_same_state(tmp_path / "run", expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "zero1"])
def test_a_sharded_state_resumes_from_a_checkpoint_after_a_kill(run, alone, tmp_path, kind):
    """No host holds all of it, so there is no in-memory checkpoint, however often one is due."""
    four = ["--processes=4", *sharded(kind)]
    fault = ["--config.data.kind=kill", "--config.data.at_step=25", "--config.data.delay=0.02"]
    often = ["--config.checkpoint.fast_every_secs=0.1", f"--config.data.once={tmp_path}/once"]
    code, out, err = run(tmp_path / "run", *four, *fault, *often, "--max_restarts=1")
    assert code == 0, out + err
    assert "rank 1 was killed by SIGKILL" in err
    assert f"restored step 20 from {tmp_path}/run/checkpoints" in out
    assert_same_state(tmp_path / "run", reference(alone, run, *four), atol=0)
    steps = [row["step"] for row in rows_of(tmp_path / "run") if "train/loss" in row]
    assert steps == [10, 20, 30, 40]


@pytest.mark.slow
def test_a_sharded_state_asked_to_stop_resumes_bit_for_bit(begin, run, alone, tmp_path):
    four = ["--processes=4", *sharded("fsdp")]
    process = begin(tmp_path / "run", *four, "--config.num_steps=40")
    os.kill(worker_of(tmp_path / "run", 2), signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 42, err
    code, out, err = run(tmp_path / "run", *four, "--config.data.delay=0.02")
    assert code == 0, out + err
    assert "restored step" in out
    assert_same_state(tmp_path / "run", reference(alone, run, *four), atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, save_another_state])
def test_a_damaged_checkpoint_of_a_sharded_state_is_quarantined(run, alone, tmp_path, damage):
    two = [*TWO, *sharded("fsdp")]
    checkpoints = tmp_path / "run/checkpoints"
    assert run(tmp_path / "run", *two, "--config.stop_at_step=20")[0] == 0
    damage(checkpoints / "20")
    code, out, err = run(tmp_path / "run", *two)
    assert code == 0, out + err
    assert "warning: step 20 cannot be restored from its checkpoint" in err
    assert f"restored step 10 from {checkpoints}" in out
    assert len(list((checkpoints / "quarantine").glob("20-*"))) == 1
    assert_same_state(tmp_path / "run", reference(alone, run, *two), atol=0)
