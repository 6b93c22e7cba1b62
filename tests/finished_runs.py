"""A finished run that commands work on, and what tests compare with."""

from __future__ import annotations

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from conftest import mesh_of
from etils import epath
from runs import digits

import trainer
from trainer.config.settings import check
from trainer.data.stream import ArraySource, TrainStream
from trainer.inference.trained_model import restore
from trainer.workdir.workdir import read_config


def finished_run(folder):
    """A run of 30 steps, evaluated and saved at 10, 20 and 30.

    The "best" loss is the highest, at 10. Checks at the end that its folder is unchanged.
    """
    config = digits(30)
    config.eval = {"every_steps": 10}
    config.checkpoint.every_steps = 10
    config.checkpoint.best_metric, config.checkpoint.best_mode = "eval/loss", "max"
    workdir = folder / "run"
    trainer.train(config, workdir, mesh_of(4))
    before = contents(workdir)
    yield workdir
    assert contents(workdir) == before, "a command has changed the folder of the run"


def contents(folder):
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


def trained_model(run, **which):
    return restore(run, check(read_config(epath.Path(run))), **which)


def apply(trained, x):
    """The model's outputs without any axis, on one device."""
    state = trained.state
    return np.asarray(
        trained.job.task.model.apply({"params": state.params, **state.model_state}, x)
    )


def row_of(run, step):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["step"] == step and "eval/loss" in row]
    return {tag: value for tag, value in row.items() if tag.startswith("eval/")}


class Several(nn.Module):
    """Two outputs with rows, one of them in bfloat16, and one without."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(3)(x.reshape(x.shape[0], -1))
        return {"logits": y, "half": y.astype(jnp.bfloat16), "aux": jnp.zeros(())}


def of_another_model(trained, model, x):
    variables = jax.jit(model.init)(jax.random.key(0), x)
    params = variables.pop("params")
    task = dataclasses.replace(trained.job.task, model=model)
    stream = TrainStream(ArraySource({"x": x}), 1, 0)
    return dataclasses.replace(
        trained,
        job=dataclasses.replace(trained.job, task=task, stream=stream),
        state=dataclasses.replace(trained.state, params=params, model_state=variables),
    )
