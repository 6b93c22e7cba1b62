"""A loss or gradient that is not finite: the run stops and says how to resume, or skips."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from conftest import mesh_of, wide
from runs import assert_bitwise_equal, digits, steps_of, without_speed

import trainer
from trainer.config.settings import check
from trainer.data.digits import load
from trainer.data.stream import ArraySource
from trainer.errors import NonFiniteState
from trainer.run.train import Workdir


class Poisoned:
    """Digits in which some examples are not numbers."""

    def __init__(self, arrays, bad):
        self._source, self._bad = ArraySource(arrays), bad

    def __len__(self):
        return len(self._source)

    def __getitem__(self, indices):
        batch = self._source[indices]
        x = batch["x"].copy()
        x[np.isin(indices, self._bad)] = np.nan
        return {**batch, "x": x}


def digits_with_nan(bad=()):
    sources = load()
    return {"train": Poisoned(sources["train"], bad), "eval": sources["eval"]}


def config(steps, bad, **changes):
    made = digits(steps, **changes)
    made.data = {"target": "test_nan:digits_with_nan", "bad": tuple(bad), "shuffle": False}
    made.checkpoint.every_steps = 3
    return made


def first_of(step):
    """The first example of the batch of a step, counted from 1."""
    return (step - 1) * 64


def test_the_run_stops_with_the_step_the_metric_and_the_last_good_checkpoint(tmp_path):
    with pytest.raises(trainer.NonFiniteLoss) as stopped:
        trainer.train(config(20, [first_of(8)]), tmp_path / "run", mesh_of(2))
    told = str(stopped.value)
    assert told.startswith("loss and grad_norm are not finite at step 8 (")
    assert f"last good checkpoint: step 6, in {tmp_path}/run/checkpoints" in told
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["train/loss"]) == (8, None)
    # With the data repaired, or such updates skipped, it resumes from there.
    skipping = config(20, [first_of(8)], nan="skip")
    assert int(trainer.train(skipping, tmp_path / "run", mesh_of(2)).state.step) == 20


@pytest.mark.parametrize("lift", ["pmap", wide("shard_map"), wide("vmap")])
@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_skipped_updates_change_nothing_but_the_step(tmp_path, lift, steps_per_call):
    """As if the batch had not been there: the same as training on without its update."""
    bad = [first_of(2), first_of(3), first_of(7)]
    skipping = {"nan": "skip", "lift": lift, "steps_per_call": steps_per_call}
    result = trainer.train(config(8, bad, **skipping), tmp_path / "run", mesh_of(2))
    rows = without_speed(tmp_path / "run/metrics.jsonl")
    assert rows[-2]["train/skipped"] == 3
    assert all(np.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)
    # With nothing but bad batches nothing moves at all.
    every = [first_of(step) for step in range(1, 9)]
    still = trainer.train(config(8, every, **skipping), tmp_path / "still", mesh_of(2)).state
    first = trainer.train(config(1, every, **skipping), tmp_path / "first", mesh_of(2)).state
    assert_bitwise_equal(still.params, first.params)
    assert_bitwise_equal(still.opt_state, first.opt_state)
    assert int(result.state.step) == int(still.step) == 8


def test_the_limit_counts_over_stops(tmp_path):
    bad = [first_of(step) for step in (2, 4, 9)]
    skipping = {"nan": "skip", "nan_limit": 2}
    trainer.train(config(20, bad, stop_at_step=6, **skipping), tmp_path / "run", mesh_of(2))
    with pytest.raises(trainer.NonFiniteLoss, match=r"at step 9 .*after 2 skipped before it"):
        trainer.train(config(20, bad, **skipping), tmp_path / "run", mesh_of(2))
    assert max(steps_of(tmp_path / "run/checkpoints")) == 6


def test_skipping_and_stopping_agree_on_good_data(tmp_path):
    sgd = {
        "optimizer": {"target": "optax:sgd", "learning_rate": 0.05}
    }  # rounding noise stays small
    stop = trainer.train(config(10, [], **sgd), tmp_path / "stop", mesh_of(2)).state
    skip = trainer.train(config(10, [], nan="skip", **sgd), tmp_path / "skip", mesh_of(2)).state
    for a, b in zip(jax.tree.leaves(stop), jax.tree.leaves(skip), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-6)


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    """The loss of a step is that of the parameters before it."""
    made = config(3, [])
    made.optimizer = {"target": "optax:sgd", "learning_rate": 1e38}
    made.checkpoint.every_steps = 1
    with pytest.raises((NonFiniteState, trainer.NonFiniteLoss)):
        trainer.train(made, tmp_path / "run", mesh_of(2))
    folder = Workdir.check(tmp_path / "run", check(made).config).checkpoints
    for step in steps_of(folder) if folder.exists() else []:
        assert np.isfinite(trainer.load(tmp_path / "run")["params"]["Dense_0"]["kernel"]).all()
        assert step < 2
