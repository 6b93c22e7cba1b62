"""Sweeps: the variants, each as a run of its own, and the table of results."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import numpy as np
import pytest
from conftest import ROOT
from runs import wait_for

import trainer
from launcher.command_line import flags
from launcher.command_line.variants import read_variants
from launcher.launch.build import make_launch_spec
from launcher.sweep.sweep import is_finished, run_sweep
from trainer.errors import UserError

CONFIG = """
from ml_collections import ConfigDict

def get_config(steps="6"):
    config = ConfigDict({
        "num_steps": int(steps),
        "global_batch_size": 8,
        "log_every_steps": 2,
        "model": {"target": "trainer.models.mlp:MLP", "hidden_size": 4, "out_size": 1},
        "loss": {"target": "trainer.losses:squared_error"},
        "optimizer": {"target": "optax:sgd", "learning_rate": 0.1},
        "data": {"target": "slow:load"},
        "eval": {"every_steps": 2},
        "checkpoint": {"every_steps": 2, "fast_every_secs": 0.0},
    })
    config.eval.batch_size = config.get_ref("global_batch_size")
    return config

"""
# Data that takes its time where DELAY says so.
DATA = """
import os, time
import numpy as np

class Rows:
    def __init__(self, seed):
        self.x = np.random.default_rng(seed).uniform(size=(24, 3)).astype(np.float32)

    def __len__(self):
        return 24

    def __getitem__(self, indices):
        time.sleep(float(os.environ.get("DELAY", 0)))
        x = self.x[indices]
        return {"x": x, "y": x.sum(-1, keepdims=True)}

def load(seed):
    return {"train": Rows(seed), "eval": Rows(1)}
"""
RATES = 'def get_sweep():\n    return [{"optimizer.learning_rate": r} for r in (0.1, 1e30, 0.01)]\n'


@pytest.fixture
def make(tmp_path):
    """Writes a config file with a sweep; returns the flag that names it, and that of a workdir."""

    def make_config(sweep, argument=""):
        (tmp_path / "mine.py").write_text(CONFIG + sweep)
        (tmp_path / "slow.py").write_text(DATA)
        return [f"--config={tmp_path}/mine.py{argument}", f"--workdir={tmp_path}/sweep"]

    return make_config


def environ_of(tmp_path, **more):
    return {"PYTHONPATH": f"{ROOT}:{tmp_path}:{ROOT}/tests", **more}


def run_here(argv):
    """In this process: no run starts if anything is wrong."""
    return run_sweep(flags.parse(["launcher", *argv]), argv, os.environ)


MISTAKES = [
    ("", [], "defines no get_sweep()"),
    ("def get_sweep(): return []\n", [], "get_sweep() yields no run"),
    ("def get_sweep(): return {'seed': 1}\n", [], "run 0 of get_sweep() is a str"),
    ("def get_sweep(): return 3\n", [], "run 0 of get_sweep() is a int"),
    ("def get_sweep():\n  yield 1 / 0\n", [], "ZeroDivisionError: division by zero (line 20)"),
    (
        "def get_sweep(): yield {}; yield {'optimizer.learnin_rate': 1.0}\n",
        [],
        "run 1 of the sweep: there is no key optimizer.learnin_rate\n"
        "  HINT: did you mean optimizer.learning_rate?",
    ),
    ("def get_sweep(): yield {'seed': 'x'}\n", [], "seed='x' should be of type int"),
    ("def get_sweep(): yield {'seed': 1.5}\n", [], "seed=1.5 should be of type int"),
    (
        "def get_sweep(): yield {}; yield {'seed': -1}\n",
        [],
        "config.seed=-1 is not in the range from 0",
    ),
    ("def get_sweep(): yield {'checkpoint': 3}\n", [], "checkpoint=3 should be of type ConfigDict"),
    (RATES, ["--config.optimizer.learning_rate=1"], "sets optimizer.learning_rate itself"),
    (
        "def get_sweep(): yield {'optimizer': {'target': 'optax:adam'}}\n",
        ["--config.optimizer.learning_rate=1"],
        "sets optimizer itself",
    ),
    (RATES, ["--sweep_index=1"], "--sweep and --sweep_index exclude each other"),
    (RATES, ["--smoke"], "--sweep and --smoke exclude each other"),
    (RATES, ["--nosweep", "--sweep_index=3"], "the sweep has 3 runs, from 0 to 2"),
    (
        RATES,
        ["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=0"],
        "--sweep runs on one machine",
    ),
]


@pytest.mark.parametrize(("sweep", "more", "text"), MISTAKES)
def test_a_mistake_is_found_before_any_run_starts(make, tmp_path, sweep, more, text):
    with pytest.raises(UserError) as error:
        run_here([*make(sweep), "--sweep", *more])
    assert text in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert not (tmp_path / "sweep").exists()


def test_the_command_ends_with_2_and_imports_no_jax(make, start, tmp_path):
    argv = [*make("def get_sweep(): yield {'sed': 1}\n"), "--sweep"]
    process = start("launcher", *argv, module="conftest_imports", environ=environ_of(tmp_path))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == ("error: run 0 of the sweep: there is no key sed\n  HINT: did you mean seed?\n")


def test_names_of_runs_are_stable_and_unique(make):
    (config, _) = make(
        "import numpy as np\n"
        "def get_sweep():\n"
        "    for rate in np.logspace(-3, -2, 3):\n"
        "        yield {'optimizer.learning_rate': rate, 'model.target': 'optax:x'}\n"
        "    yield {'optimizer.target': 'a/b:c', 'model.target': '\\u00e9'}\n"
        "    yield {}\n"
    )
    variants = read_variants(config.removeprefix("--config="))
    assert [variant.name for variant in variants] == [
        "00-learning_rate=0.001,model.target=optax_x",
        "01-learning_rate=0.00316228,model.target=optax_x",
        "02-learning_rate=0.01,model.target=optax_x",
        "03-optimizer.target=a_b_c,model.target",
        "04-unchanged",
    ]
    assert type(variants[1].overrides["optimizer.learning_rate"]) is float
    assert variants[0].folder("gs://bucket/sweep") == f"gs://bucket/sweep/{variants[0].name}"
    assert variants[0].folder(f"runs/{variants[0].name}") == f"runs/{variants[0].name}"


def test_a_run_is_the_config_with_its_changes(make, tmp_path):
    """Numbers, blocks, a schedule for a number, what refers to what is changed; the argument."""
    argv = make(
        "def get_sweep(steps):\n"
        "    yield {'global_batch_size': 4, 'stop_at_step': int(steps) - 1, 'clip_norm': 1}\n"
        "    yield {'optimizer': {'target': 'optax:adamw', 'weight_decay': 0.1}}\n"
        "    yield {'optimizer.learning_rate': {'target': 'a:b', 'peak_value': 0.1}}\n"
        "    yield {'data': {'target': 'c:d'}, 'clip_norm': None}\n",
        ":3",
    )

    def parse(index):
        return flags.parse(["launcher", *argv, f"--sweep_index={index}", "--config.seed=7"])

    first = parse(0)
    assert first.config.global_batch_size == first.config.eval.batch_size == 4
    assert (first.config.num_steps, first.config.stop_at_step) == (3, 2)
    assert first.config.clip_norm == 1.0
    assert first.config.seed == 7
    assert first.workdir.startswith(f"{tmp_path}/sweep/00-")
    assert parse(1).config.optimizer.to_dict() == {"target": "optax:adamw", "weight_decay": 0.1}
    assert parse(2).config.optimizer.learning_rate.peak_value == 0.1
    assert parse(3).config.data.target == "c:d"
    assert parse(3).config.data.shuffle is True  # the defaults of a block that was replaced


def read_sweep(tmp_path):
    return json.loads((tmp_path / "sweep/sweep.json").read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_run_fails_the_others_do_not_and_the_next_sweep_runs_only_that_one(
    make, launch, tmp_path
):
    argv = [*make(RATES), "--sweep", "--fake_devices=2"]
    code, out, err = launch(*argv, environ=environ_of(tmp_path))
    assert code == 1, out + err
    assert " not finite at step " in err
    table = out[out.index("\nrun  learning_rate") :].splitlines()[2:]
    assert [line.split()[:2] for line in table[:2]] == [["0", "0.1"], ["2", "0.01"]]
    assert re.match(r"1 +1e\+30 .*failed at step .*exit code 1 +01-learning_rate=1e\+30", table[2])
    found = read_sweep(tmp_path)
    assert (found["metric"], found["mode"]) == ("eval/loss", "min")
    assert [run["exit_code"] for run in found["runs"]] == [0, 1, 0]
    assert [run["steps"] for run in found["runs"]][::2] == [6, 6]
    for run in found["runs"][::2]:
        folder = tmp_path / "sweep" / run["workdir"]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
        assert (run["best"], run["last"]) == (min(losses), losses[-1])

    # The same numbers as the run by itself.
    alone = f"--workdir={tmp_path}/alone"
    by_hand = [argv[0], alone, "--fake_devices=2", "--config.optimizer.learning_rate=0.01"]
    assert launch(*by_hand, environ=environ_of(tmp_path))[0] == 0
    ours, other = (
        trainer.load(place)["params"]["Dense_0"]["kernel"]
        for place in (tmp_path / "sweep/02-learning_rate=0.01", tmp_path / "alone")
    )
    np.testing.assert_array_equal(ours, other)

    rates = hparams_of(tmp_path / "sweep", "optimizer.learning_rate")
    assert rates == {
        "00-learning_rate=0.1": 0.1,
        "01-learning_rate=1e+30": 1e30,
        "02-learning_rate=0.01": 0.01,
    }

    before = (tmp_path / "sweep/00-learning_rate=0.1/env.json").stat().st_mtime_ns
    code, out, _ = launch(*argv, environ=environ_of(tmp_path))
    assert code == 1
    assert out.count(": already finished\n") == 2
    assert "run 1 of 3, 01-learning_rate=1e+30:\n" in out
    assert (tmp_path / "sweep/00-learning_rate=0.1/env.json").stat().st_mtime_ns == before

    # Longer runs are not finished ones.
    code, out, _ = launch(*argv, "--dry_run", "--config.num_steps=8", environ=environ_of(tmp_path))
    assert code == 0
    assert out.count("stopped at step 6 of 8") == 2 or out.count("finished") == 2
    code, out, _ = launch(*argv, "--config.num_steps=8", environ=environ_of(tmp_path))
    assert [run["steps"] for run in read_sweep(tmp_path)["runs"]][::2] == [8, 8]


def hparams_of(folder, key):
    """What TensorBoard's HPARAMS tab lists: the value of a key, by run."""
    from tensorboard import context
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    runs = plugin_event_multiplexer.EventMultiplexer()
    runs.AddRunsFromDirectory(str(folder))
    runs.Reload()
    provider = data_provider.MultiplexerDataProvider(runs, str(folder))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    any_status = [0, 1, 2, 3]
    request = api_pb2.ListSessionGroupsRequest(slice_size=100, allowed_statuses=any_status)
    handler = list_session_groups.Handler(context.RequestContext(), backend, "", request)
    return {group.name: group.hparams[key].number_value for group in handler.run().session_groups}


def wait_for_step(workdir, name, step, process, seconds=90):
    deadline = time.monotonic() + seconds
    while True:
        if list((workdir / name).glob(f"checkpoints/{step}")):
            return
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


SEEDS = "def get_sweep():\n    return [{'seed': seed} for seed in range(3)]\n"


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--fake_devices=1"], ["--processes=2", "--fake_devices=1"]])
def test_a_stopped_sweep_resumes(make, start, launch, tmp_path, more):
    argv = [*make(SEEDS), "--sweep", "--config.num_steps=12", *more]
    process = start(*argv, environ=environ_of(tmp_path, DELAY="0.2"))
    wait_for_step(tmp_path / "sweep", "01-seed=1", 2, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 42, out + err
    assert "asked to stop: saved at step" in err
    assert "stopped at step" in out
    assert not (tmp_path / "sweep/02-seed=2").exists()
    codes = [run["exit_code"] for run in read_sweep(tmp_path)["runs"]]
    assert codes == [0, 42, None]

    code, out, err = launch(*argv, environ=environ_of(tmp_path))
    assert code == 0, err
    assert out.count(": already finished\n") == 1
    assert out.count("restored step ") == 1
    assert [run["steps"] for run in read_sweep(tmp_path)["runs"]] == [12, 12, 12]


@pytest.mark.slow
def test_a_killed_sweep_stops_its_run(make, start, tmp_path):
    argv = [*make(SEEDS), "--sweep", "--config.num_steps=1000"]
    process = start(*argv, environ=environ_of(tmp_path, DELAY="0.1"))
    wait_for_step(tmp_path / "sweep", "00-seed=0", 2, process)
    process.kill()
    wait_for(tmp_path / "sweep/00-seed=0/.lock")
    deadline = time.monotonic() + 30
    while (tmp_path / "sweep/00-seed=0/.lock").read_text():  # emptied when it is let go of
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_by_its_index(make, launch, tmp_path):
    argv = [*make(SEEDS), "--sweep_index=2", "--config.num_steps=2"]
    code, out, err = launch(*argv, environ=environ_of(tmp_path))
    assert code == 0, err
    assert f"workdir {tmp_path}/sweep/02-seed=2\n" in out
    assert os.listdir(tmp_path / "sweep") == ["02-seed=2"]
    config = json.loads((tmp_path / "sweep/02-seed=2/config.json").read_text())
    assert config["seed"] == 2


def test_what_has_finished_is_known_from_its_folder(make, launch, tmp_path):
    argv = make("def get_sweep(): yield {'optimizer.learning_rate': 0.0}\n")
    argv += ["--sweep_index=0", "--config.early_stop.patience=1"]

    def finished(*more):
        return is_finished(make_launch_spec(flags.parse(["launcher", *argv, *more]), os.environ))

    assert not finished()
    assert launch(*argv, "--config.stop_at_step=2", environ=environ_of(tmp_path))[0] == 0
    assert finished("--config.stop_at_step=2")
    assert not finished()
    assert launch(*argv, environ=environ_of(tmp_path))[0] == 0
    assert (tmp_path / "sweep/00-learning_rate=0/checkpoints/4").exists()  # of 6: no better
    assert finished()
    assert not finished("--config.early_stop.patience=2")
