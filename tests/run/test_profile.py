"""--profile: the steps that were asked for are in the trace, and not in the figures of speed."""

from __future__ import annotations

import gzip
import json
import time

import jax
import pytest
from conftest import mesh_of
from runs import assert_bitwise_equal, collect, digits, rows_of

import trainer
from trainer.data.digits import load
from trainer.data.stream import ArraySource
from trainer.errors import Preempted, UserError
from trainer.run.profiling import Profile


def steps_in(workdir, name, rank=0):
    """The steps that a trace in Chrome's format holds."""
    folder = workdir / "plugins/profile" / name
    assert (folder / f"rank-{rank}.xplane.pb").stat().st_size > 1000
    with gzip.open(folder / f"rank-{rank}.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    return [int(e["args"]["step_num"]) for e in events if e.get("name") == "train"]


def test_the_trace_holds_the_steps_and_changes_no_number(tmp_path, capsys):
    plain = trainer.train(digits(12), tmp_path / "plain", mesh_of(2))
    traced = trainer.train(digits(12), tmp_path / "run", mesh_of(2), profile="6:3")
    assert steps_in(tmp_path / "run", "steps-7-9") == [7, 8, 9]
    assert [p.name for p in (tmp_path / "run/plugins/profile").iterdir()] == ["steps-7-9"]
    assert_bitwise_equal(plain.state, traced.state)
    out = capsys.readouterr().out
    assert f"traced steps 7 to 9, in {tmp_path}/run/plugins/profile/steps-7-9" in out
    assert f"trace: xprof --logdir {tmp_path}/run" in out


def test_whole_calls_are_traced(tmp_path):
    config = digits(20, steps_per_call=5)
    trainer.train(config, tmp_path / "run", mesh_of(2), profile=Profile(7, 4))
    assert steps_in(tmp_path / "run", "steps-6-15") == [6, 11]


def test_a_trace_ends_with_the_run(tmp_path, capsys):
    """Also if the run is asked to stop; a run that resumes past the steps says so."""

    def stop(step, phase):
        return step >= 4 and phase == "train"

    with pytest.raises(Preempted):
        trainer.train(digits(8), tmp_path / "run", mesh_of(2), profile="2:100", stop_requested=stop)
    assert steps_in(tmp_path / "run", "steps-3-4") == [3, 4]
    trainer.train(digits(8), tmp_path / "run", mesh_of(2), profile="2:100")
    assert steps_in(tmp_path / "run", "steps-5-8") == [5, 6, 7, 8]
    trainer.train(digits(10), tmp_path / "run", mesh_of(2), profile="2:3")
    assert "nothing is traced: --profile=2:3 lies before step 8" in capsys.readouterr().out


def test_training_continues_where_no_trace_is_possible(tmp_path, capsys):
    jax.profiler.start_trace(str(tmp_path / "other"))
    try:
        trainer.train(digits(6), tmp_path / "run", mesh_of(2), profile="2:2")
    finally:
        jax.profiler.stop_trace()
    assert "warning: no trace of the steps: " in capsys.readouterr().err
    assert not (tmp_path / "run/plugins").exists()


@pytest.mark.parametrize("text", ["abc", "5", "-1:3", "10:0", "5:5:5", "1.5:2", "²:1"])
def test_what_is_no_profile_is_refused_at_once(launch, tmp_path, text):
    with pytest.raises(UserError, match=r"START:STEPS"):
        Profile.parse(text)
    if text == "abc":
        workdir = tmp_path / "run"
        command = ["--config=configs/digits.py", f"--workdir={workdir}", f"--profile={text}"]
        code, _, err = launch(*command)
        assert code == 2
        assert err.startswith("error: --profile=abc should be START:STEPS")
        assert len(err.splitlines()) == 2
        assert not workdir.exists()


def test_steps_that_the_run_does_not_have_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--profile=8:1 .*stops at step 8\n.*from 0 to 7"):
        trainer.train(digits(8), tmp_path / "run", mesh_of(2), profile="8:1")
    assert not (tmp_path / "run").exists()


def test_the_clock_of_the_log_stands_still_meanwhile():
    log, found = collect()

    def take(first, seconds):
        found["now"] += seconds
        log.add(first, rows_of([1.0]))

    take(0, 5)  # compiles
    take(1, 2)
    log.pause()
    found["now"] += 100
    take(2, 50)
    log.exclude(30)  # an evaluation among the traced steps is not left out twice
    found["now"] += 100
    log.resume()
    take(3, 4)
    log.emit(4)
    assert found["rows"][-1].step_seconds == 3
    log.pause()
    found["now"] += 7
    log.resume()
    take(4, 1)
    log.emit(5)
    assert found["rows"][-1].step_seconds == 1


class Slow(ArraySource):
    """A tenth of a second a batch."""

    def __getitem__(self, indices):
        if indices.size > 1:  # one is asked for to see the shapes
            time.sleep(0.1)
        return super().__getitem__(indices)


def slow_digits():
    """Named by a config below."""
    return {"train": Slow(load()["train"])}


def test_all_other_steps_are_in_the_speed_and_none_of_the_traced(tmp_path):
    """Steps run ahead of their metrics, which must not move them to the other side."""
    config = digits(12)
    config.log_every_steps = 12
    config.data = {"target": "test_profile:slow_digits"}
    metrics = trainer.train(config, tmp_path / "run", mesh_of(2), profile="6:3").metrics
    assert 0.099 < metrics["train/step_seconds"] < 0.2


@pytest.mark.slow
def test_each_rank_writes_its_own(launch, tmp_path):
    command = ["--config=configs/digits.py", f"--workdir={tmp_path}/run", "--profile=3:2"]
    command += ["--processes=2", "--config.num_steps=6"]
    code, out, err = launch(*command)
    assert code == 0, out + err
    for rank in range(2):
        assert steps_in(tmp_path / "run", "steps-4-5", rank) == [4, 5]
