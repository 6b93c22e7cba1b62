"""A run that is asked to stop saves its state, whenever that is."""

from __future__ import annotations

import signal
import time

import pytest
from conftest import mesh_of, wide
from runs import (
    assert_bitwise_equal,
    digits,
    steps_of,
    wait_for,
    without_speed,
)

import trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_resumes(start, launch, tmp_path, number):
    arguments = [
        "--config=configs/digits.py",
        "--fake_devices=2",
        "--config.log_every_steps=20",
        "--config.checkpoint.every_steps=100000",
        "--config.num_steps=3000",
    ]
    process = start(*arguments, f"--workdir={tmp_path}/run")
    wait_for(tmp_path / "run/metrics.jsonl")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 42, out + err
    saved = steps_of(tmp_path / "run/checkpoints")
    assert f"asked to stop: saved at step {saved[0]}" in err
    stop = f"--config.stop_at_step={saved[0] + 50}"
    code, out, _ = launch(*arguments, stop, f"--workdir={tmp_path}/run")
    assert code == 0
    assert f"restored step {saved[0]}" in out
    assert launch(*arguments, stop, f"--workdir={tmp_path}/whole")[0] == 0
    last = [without_speed(tmp_path / d / "metrics.jsonl")[-1] for d in ("run", "whole")]
    assert last[0]["step"] == saved[0] + 50
    assert last[0]["eval/loss"] == last[1]["eval/loss"]


def test_ctrl_c_saves_even_if_it_also_ends_the_reader_of_the_log(start, tmp_path):
    process = start("--config=configs/digits.py", "--fake_devices=2", "--config.num_steps=100000",
                    "--config.log_every_steps=20", f"--workdir={tmp_path}/run")  # fmt: skip
    wait_for(tmp_path / "run/metrics.jsonl")
    time.sleep(0.5)  # past the first row: what writes it may forgive an error
    process.stderr.close()  # as of `2>&1 | tee log`
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 42
    process.stdout.close()
    assert steps_of(tmp_path / "run/checkpoints")


def test_asked_to_stop_before_the_first_step(tmp_path):
    with pytest.raises(trainer.Preempted) as stopped:
        trainer.train(
            digits(10), tmp_path / "run", mesh_of(2), stop_requested=lambda step, phase: True
        )
    assert stopped.value.step == 0
    whole = trainer.train(digits(10), tmp_path / "whole", mesh_of(2))
    assert_bitwise_equal(trainer.train(digits(10), tmp_path / "run", mesh_of(2)).state, whole.state)


def test_it_says_when_it_loads_data_and_when_it_waits_for_the_other_processes(tmp_path):
    """A launcher tells the rank that loads data from those that wait for it."""
    phases = []

    def record(step, phase):
        phases.append(phase)
        return False

    trainer.train(digits(1), tmp_path / "run", mesh_of(1), stop_requested=record)
    assert phases[:2] == ["load", "start"]


class Asked:
    """Says yes from its n-th question on."""

    def __init__(self, questions):
        self.left = questions

    def __call__(self, step, phase):
        self.left -= phase not in ("load", "start", "wait", "save")
        return self.left < 0


@pytest.mark.parametrize("questions", [3, wide(12), 16, wide(25), wide(33), wide(38), 44])
def test_asked_to_stop_at_any_moment_nothing_is_lost(tmp_path, questions):
    """Between steps, in the middle of a row, of an evaluation, and of the last evaluation."""

    def config():
        made = digits(33)
        made.eval = {"every_steps": 11, "batch_size": 90}  # four questions an evaluation
        made.log_every_steps = 7
        return made

    whole = trainer.train(config(), tmp_path / "whole", mesh_of(2))
    with pytest.raises(trainer.Preempted):
        trainer.train(config(), tmp_path / "run", mesh_of(2), stop_requested=Asked(questions))
    rest = trainer.train(config(), tmp_path / "run", mesh_of(2))
    assert_bitwise_equal(whole.state, rest.state)
    rows, expected = (without_speed(tmp_path / d / "metrics.jsonl") for d in ("run", "whole"))
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-9)
    again = trainer.train(config(), tmp_path / "run", mesh_of(2))
    assert again.metrics["eval/loss"] == whole.metrics["eval/loss"]
    assert without_speed(tmp_path / "run/metrics.jsonl") == rows
    best = [steps_of(tmp_path / d / "best") for d in ("run", "whole")]
    assert best[0] == best[1]
