"""What the config of a folder that somebody has sent may name."""

from __future__ import annotations

import sys

import pytest

import launcher.cli
from trainer.config import trust
from trainer.config.targets import build, resolve
from trainer.errors import UserError

CODE = """
import os, shutil
from os import system
from functools import partial
import optax
with open({ran!r}, "a") as file:
    file.write(__name__ + " ")
def loss(outputs, batch): return outputs
double = partial(loss, batch=2)
class Model:
    def call(self): return 1
class Other(optax.MultiSteps): pass
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A current folder with a package, a folder that was sent into it, and code elsewhere."""
    here = tmp_path / "here"
    elsewhere = tmp_path / "elsewhere"
    code = CODE.format(ran=str(tmp_path / "ran"))
    for place in (
        here / "own_package_3/__init__.py",
        here / "own_module_3.py",
        here / "sent_3/__init__.py",
        here / "sent_3/evil.py",
        here / "bare_3/run/evil.py",
        elsewhere / "installed_3.py",
    ):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(code)
    (here / "own_package_3/model.py").write_text(code)
    (here / "sent_3/run").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", ["", str(elsewhere), *sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0].endswith("_3")]:
        del sys.modules[name]


def ran(project):
    return (project / "ran").read_text().split() if (project / "ran").exists() else []


ALLOWED = [
    "trainer.models.mlp:MLP",
    "trainer.losses:softmax_cross_entropy",
    "trainer.data.augment:flip_and_shift",
    "trainer.optimizers:sgd",
    "trainer.schedules:warmup_cosine",
    "trainer.metrics:accuracy",
    "optax:adamw",
    "optax:contrib.muon",
    "optax.contrib:muon",
    "own_module_3:loss",
    "own_module_3:double",
    "own_module_3:Model.call",
    "own_module_3:Other",
    "own_module_3:optax.adam",
    "own_package_3:Model",
    "own_package_3.model:Model",
]
REFUSED = [
    # other programs, and podlift itself
    "os:system",
    "subprocess:run",
    "builtins:exec",
    "jax.numpy:save",
    "installed_3:loss",
    "trainer.workdir.paths:write_whole",
    "trainer:train",
    "launcher.cli.train:main",
    "__main__:main",
    # what a module that may be named has imported from one that may not
    "own_module_3:os.system",
    "own_module_3:system",
    "own_module_3:shutil.rmtree",
    "trainer.data.images:os.system",
    "trainer.data.grain_source:resolve",
    "own_module_3:loss.__globals__.update",
    "trainer.losses:__loader__.exec_module",
    # what came with the folder
    "sent_3:loss",
    "sent_3.evil:loss",
    "bare_3.run.evil:loss",
]


@pytest.mark.parametrize("target", ALLOWED)
def test_podlift_optax_and_own_packages_may_be_named(project, target):
    with trust.limited(trust.Limit(str(project / "here/sent_3/run"))):
        assert callable(resolve(target, "config.model"))


@pytest.mark.parametrize("target", REFUSED)
def test_other_code_is_not_even_imported(project, target, monkeypatch):
    place = project / f"here/{'bare_3' if 'bare' in target else 'sent_3'}/run"
    monkeypatch.setitem(sys.modules, "__main__", launcher.cli)
    with trust.limited(trust.Limit(str(place))), pytest.raises(UserError) as refused:
        resolve(target, "config.model")
    assert f"config.model.target={target!r} in {place} names code" in str(refused.value)
    assert "--trust" in refused.value.hint
    assert [name for name in ran(project) if not name.startswith("own")] == []


def test_a_block_within_a_block_is_refused(project):
    block = {"target": "optax:sgd", "learning_rate": {"target": "installed_3:loss"}}
    with (
        trust.limited(trust.Limit(str(project / "run"))),
        pytest.raises(UserError, match=r"config\.optimizer\.learning_rate\.target"),
    ):
        build(block, "config.optimizer")
    assert ran(project) == []


def test_what_the_user_typed_may_run(project):
    limit = trust.Limit(str(project / "run"), frozenset({"installed_3:loss"}))
    with trust.limited(limit):
        assert callable(resolve("installed_3:loss", "config.loss"))
    assert ran(project) == ["installed_3"]


def test_within_the_folder_that_was_sent_nothing_is_ones_own(project, monkeypatch):
    monkeypatch.chdir(project / "here")
    for place in (project / "here", project):
        with trust.limited(trust.Limit(str(place))), pytest.raises(UserError):
            resolve("own_module_3:loss", "config.loss")
    assert ran(project) == []


def test_without_a_limit_and_for_what_is_missing_nothing_changes(project):
    assert callable(resolve("installed_3:loss", "config.loss"))
    with (
        trust.limited(trust.Limit(str(project / "run"))),
        pytest.raises(UserError, match=r"there is no module 'trainer\.models\.mpl'"),
    ):
        resolve("trainer.models.mpl:MLP", "config.model")
