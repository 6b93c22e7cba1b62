"""Where the time of a run goes."""

from __future__ import annotations

import json

import pytest
from conftest import mesh_of

import trainer
from trainer.metrics_writer.goodput import Goodput


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += seconds


def test_every_second_is_of_one_kind():
    clock = Clock()
    goodput = Goodput(clock)
    clock.tick(3)
    goodput.begin_steps()

    def batches():
        for number in range(3):
            clock.tick(0.5)
            yield number

    for _ in goodput.waiting(batches()):
        clock.tick(2)
        with goodput.spending("evaluate"):
            clock.tick(1)
            with goodput.spending("save"):
                clock.tick(0.25)
    seconds = goodput.seconds()
    expected = {"start": 3, "data": 1.5, "step": 6, "evaluate": 3, "save": 0.75}
    assert {kind: spent for kind, spent in seconds.items() if spent} == expected
    assert max(goodput.shares(), key=goodput.shares().get) == "step"
    assert sum(goodput.shares().values()) == pytest.approx(1)

    with goodput.spending("profile"):  # a kind that only some runs have, read while it lasts
        clock.tick(1)
        assert goodput.seconds()["profile"] == 1

    saved = json.loads(json.dumps(goodput.to_json()))
    clock.tick(10)
    later = Goodput(clock)
    clock.tick(4)
    later.resume(saved)
    clock.tick(1)
    later.begin_steps()
    clock.tick(7)
    seconds = later.seconds()
    assert (seconds["start"], seconds["restart"]) == (3, 5)
    assert seconds["step"] == 6 + 7
    assert later.starts == 2


def test_a_block_that_raises_is_over():
    clock = Clock()
    goodput = Goodput(clock)
    goodput.begin_steps()

    def fail():
        with goodput.spending("save"):
            clock.tick(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.tick(2)
    assert goodput.seconds()["step"] == 2


def test_goodput_survives_a_restart(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from configs.digits import get_config

    config = get_config()
    config.update(num_epochs=None, num_steps=12, stop_at_step=6)
    trainer.train(config, tmp_path / "run", mesh_of(2))
    first = capsys.readouterr().out
    assert "time: " in first
    config.update(stop_at_step=None)
    trainer.train(config, tmp_path / "run", mesh_of(2))
    assert "time, of 2 starts: " in capsys.readouterr().out
    curves = EventAccumulator(str(tmp_path / "run"))
    curves.Reload()
    starts = curves.Scalars("goodput/start")
    assert {event.step for event in starts} == {6, 12}
    assert len({event.value for event in starts}) == 1  # the second was a restart
    assert curves.Scalars("goodput/restart")[-1].value > 0
    assert curves.Scalars("goodput/compile")[-1].value > curves.Scalars("goodput/compile")[0].value
