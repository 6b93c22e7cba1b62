"""A run ends where evaluations stop getting better, and stays ended."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import mesh_of, wide
from runs import assert_bitwise_equal, config_of, digits, steps_of, without_speed

import trainer
from launcher.report.read import read_runs
from trainer.errors import Preempted, UserError
from trainer.run.early_stop import EarlyStop


def worsening(patience, steps=40, **changes):
    """Evaluated every 5 steps; the first evaluation is the best, as higher losses are better."""
    config = digits(steps, **changes)
    config.eval = {"every_steps": 5}
    config.checkpoint = {"every_steps": 7, "best_metric": "eval/loss", "best_mode": "max"}
    config.early_stop = {"patience": patience}
    return config


@pytest.mark.parametrize(
    ("mode", "min_delta", "values", "waited"),
    [
        ("min", 0.0, [3.0, 2.0, 2.0, 2.5], [0, 0, 1, 2]),
        ("max", 0.0, [3.0, 2.0, 3.5, 3.5], [0, 1, 0, 1]),
        ("min", 0.5, [3.0, 2.75, 2.5, 2.25], [0, 1, 2, 0]),  # small steps add up
        ("min", 0.0, [float("nan"), 2.0, float("inf"), 1.0], [1, 0, 1, 0]),
    ],
)
def test_what_counts_as_an_improvement(mode, min_delta, values, waited):
    early = EarlyStop("eval/loss", mode, 2, min_delta)
    found = []
    for step, value in enumerate(values):
        again = EarlyStop("eval/loss", mode, 2, min_delta)
        again.from_json(json.loads(json.dumps(early.to_json())))  # a restart changes nothing
        early = again
        early.add(step, {"eval/loss": value})
        found.append(early.waited)
        assert bool(early.reason) == (early.waited >= 2)
    assert found == waited


def test_another_metric_begins_to_count_anew():
    early = EarlyStop("eval/loss", "min", 1, 0.0)
    early.from_json({"metric": "eval/loss", "mode": "max", "best": 9.0, "step": 5, "waited": 7})
    assert (early.best, early.waited, early.reason) == (None, 0, "")


@pytest.mark.parametrize(
    ("lift", "steps_per_call"),
    [("pmap", 1), wide("shard_map", 1), wide("vmap", 1), wide("pmap", 4)],
)
def test_it_ends_stays_ended_and_resumes_with_more_patience(tmp_path, capsys, lift, steps_per_call):
    changes = {"lift": lift, "steps_per_call": steps_per_call}
    # Evaluations after calls of 4 steps come at 8, 12, 16, 20.
    ends, later = (20, 30) if steps_per_call == 1 else (20, 32)
    run, mesh = tmp_path / "run", mesh_of(2)
    state = trainer.train(worsening(3, **changes), run, mesh).state
    assert int(state.step) == ends
    assert steps_of(run / "checkpoints")[-1] == ends
    told = capsys.readouterr().out
    assert f"stopped early at step {ends} of 40: eval/loss has not improved on " in told
    assert "in 3 evaluations" in told
    assert "--config.early_stop.patience=6" in told
    rows = without_speed(run / "metrics.jsonl")

    for _ in range(2):
        again = trainer.train(worsening(3, **changes), run, mesh)
        assert_bitwise_equal(again.state, state)
        assert f"nothing to do: stopped early at step {ends} of 40" in capsys.readouterr().out
        assert without_speed(run / "metrics.jsonl") == rows

    patient = trainer.train(worsening(5, **changes), run, mesh).state
    whole = trainer.train(worsening(5, **changes), tmp_path / "whole", mesh).state
    assert int(patient.step) == later
    assert_bitwise_equal(patient, whole)
    assert without_speed(run / "metrics.jsonl") == without_speed(tmp_path / "whole/metrics.jsonl")


def test_a_resume_neither_forgets_nor_counts_twice(tmp_path):
    run = tmp_path / "run"
    trainer.train(worsening(3, stop_at_step=10), run, mesh_of(2))
    shutil.copytree(run, tmp_path / "off")
    assert int(trainer.train(worsening(3), run, mesh_of(2)).state.step) == 20
    assert int(trainer.train(worsening(None), tmp_path / "off", mesh_of(2)).state.step) == 40


def asked_at(step, phase):
    """Asks to stop from there on."""
    asked = False

    def stop_requested(*now):
        nonlocal asked
        asked |= now == (step, phase)
        return asked

    return stop_requested


def test_an_evaluation_that_was_put_off_counts_once(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Preempted):
        trainer.train(worsening(3), run, mesh_of(2), stop_requested=asked_at(10, "evaluate"))

    def dies_after_it(step, phase):
        if phase == "compile":
            raise RuntimeError("killed")
        return False

    # The evaluation is made, and no state is saved that knows of it.
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            trainer.train(worsening(3), run, mesh_of(2), stop_requested=dies_after_it)
    state = trainer.train(worsening(3), run, mesh_of(2)).state
    assert int(state.step) == 20
    rows = [row["step"] for row in without_speed(run / "metrics.jsonl") if "eval/loss" in row]
    assert rows == [5, 10, 15, 20]


def test_the_last_evaluation_may_have_been_put_off(tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(Preempted):
        trainer.train(worsening(1), run, mesh_of(2), stop_requested=asked_at(10, "evaluate"))
    for _ in range(2):
        assert int(trainer.train(worsening(1), run, mesh_of(2)).state.step) == 10
        assert "nothing to do: stopped early at step 10" in capsys.readouterr().out


def test_without_evaluations_it_is_refused(tmp_path):
    config = config_of("mlp")
    config.early_stop = {"patience": 3}
    with pytest.raises(UserError, match="no examples to evaluate on"):
        trainer.train(config, tmp_path / "run", mesh_of(1))
    with pytest.raises(UserError, match=r"early_stop\.patience=0"):
        trainer.train(worsening(0), tmp_path / "run", mesh_of(1))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_end_together(launch, tmp_path):
    arguments = [
        "--config=configs/digits.py",
        f"--workdir={tmp_path / 'run'}",
        "--processes=2",
        "--fake_devices=1",
        "--config.eval.every_steps=5",
        "--config.checkpoint.best_mode=min",  # accuracy rises, so the first is the best
        "--config.early_stop.patience=2",
    ]
    code, out, err = launch(*arguments)
    assert (code, err) == (0, "")
    assert "stopped early at step 15 of 440: eval/accuracy has not improved" in out
    code, out, err = launch(*arguments)
    assert (code, err) == (0, "")
    assert "nothing to do: stopped early at step 15 of 440" in out
    (told,) = read_runs([str(tmp_path / "run")])
    assert (told.state, told.status) == ("finished", "stopped early at step 15 of 440")
    assert steps_of(tmp_path / "run/checkpoints") == [15]
