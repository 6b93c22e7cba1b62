"""`python -m launcher plan`, from the command line to its answers, on fake devices."""

import subprocess
import sys

import pytest
from conftest import ROOT
from plans import DIGITS, RESNET, UPDATE_BYTES, bytes_of, make_plan


@pytest.fixture
def plan(tmp_path):
    return make_plan(tmp_path)


def test_without_a_compiler_the_plan_is_made_on_fake_devices(plan):
    code, out, err, found = plan(RESNET, "--topology=v5e:2x2", compilers=False)
    assert code == 0, err
    assert "scripts/setup.sh tpu" in found["note"]
    assert found["note"] in out
    assert found["parameters"] == 77_754
    assert found["parameter_bytes"] == 4 * 77_754
    assert found["devices"] == 4
    assert found["batch_per_device"] == 32
    assert found["fits"] is True
    assert found["hbm_bytes"] == int(15.75 * 2**30)
    assert bytes_of(found, "gradients, statistics, metrics") == UPDATE_BYTES
    assert found["predicted"]["step_seconds"] > 0
    assert found["predicted"]["bound"] in ("compute", "memory", "collectives")
    assert [row["chips"] for row in found["scaling"]][-1] == 50_000
    assert "predicted, not measured" in out
    assert "sync BN" in out


def test_pictures(plan, tmp_path):
    files = [f"--plot={tmp_path}/plan.png", f"--html={tmp_path}/plan.html"]
    code, out, err, _ = plan(
        DIGITS, "--compare=v5e:2x2,cpu:4", "--batch=16", *files, compilers=False
    )
    assert code == 0, err
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "plan.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    assert f"wrote {tmp_path}/plan.png" in out


def test_more_devices_than_are_faked(plan):
    code, out, err, found = plan(
        DIGITS, "--topology=cpu:1024", "--config.global_batch_size=1024", compilers=False
    )
    assert code == 0, err
    assert (found["devices"], found["batch_per_device"], found["global_batch_size"]) == (
        1024,
        1,
        1024,
    )
    assert "1,024 examples, 1 per device" in out


def test_shapes_alone_with_a_schedule_over_epochs(plan):
    code, _, err, found = plan(
        RESNET,
        "--topology=v5e:2x2",
        "--example=x=float32[8,8,1] y=int32[]",
        "--batch=16",
        "--config.steps_per_call=10",
        "--nosync_bn",
        compilers=False,
    )
    assert code == 0, err
    assert found["predicted"]["sync_bn"] is False
    assert found["predicted"]["sync_bn_seconds"] > 0
    assert found["argument_bytes"] > 10 * 16 * 64 * 4


@pytest.mark.wide
def test_a_damaged_cache_is_no_cache(plan, tmp_path):
    cache = tmp_path / "cache"
    _, _, _, first = plan(DIGITS, "--topology=cpu:2", compilers=False)
    (entry,) = (cache / "podlift/plan").iterdir()
    for text in ("", "{}", "[]", entry.read_text().replace('"bytes_accessed": ', '"x": NaN, "y":')):
        entry.write_text(text)
        code, _, err, again = plan(DIGITS, "--topology=cpu:2", compilers=False)
        assert code == 0, err
        assert not again["cached"]
        assert again["peak_bytes"] == first["peak_bytes"]


NAMED = """
import flax.linen as nn

class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1)
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch", name="norm1")(x)
        return nn.Dense(10)(x)
"""


def test_normalisation_is_known_by_its_statistics_and_not_by_its_name(plan, tmp_path):
    (tmp_path / "mine.py").write_text(NAMED)
    own(tmp_path)
    code, out, err, found = plan(
        "--config=own.py", "--topology=v5e:2x2", cwd=tmp_path, compilers=False
    )
    assert code == 0, err
    assert "of which batch normalisation" in out
    assert found["predicted"]["sync_bn_seconds"] > 0


def own(folder):
    """A config like that of the digits, with a model of the user's."""
    (folder / "own.py").write_text(
        f"import runpy\nbase = runpy.run_path({str(ROOT / 'configs/digits.py')!r})\n"
        "def get_config():\n    config = base['get_config']()\n"
        "    config.model = {'target': 'mine:Model'}\n    return config\n"
    )


MODEL = """
import flax.linen as nn

class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(10)(x)
        return y @ y  # a mistake
"""


def test_a_model_that_does_not_trace_shows_its_line(plan, tmp_path):
    (tmp_path / "mine.py").write_text(MODEL)
    code, _, err, _ = plan(
        DIGITS,
        "--topology=cpu:4",
        "--config.model.target=mine:Model",
        *("--config.model.hidden_size=1",),
        cwd=tmp_path,
    )
    assert code == 2, err  # an unknown keyword of the model comes first
    own(tmp_path)
    code, _, err, _ = plan("--config=own.py", "--topology=cpu:4", cwd=tmp_path)
    assert code == 1
    assert "mine.py:8, in __call__: return y @ y  # a mistake" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--topology is missing"),
        (["--topology=v5e:16x61"], "v5e:16x16"),
        (["--topology=v5e:2x4", "--config.global_batch_size=100"], "sizes that do: 96 or 104"),
        (["--topology=cpu:4", "--batch=lots"], "--batch=lots"),
        (["--topology=cpu:4", "--batch=²"], "--batch=²"),
        (["--topology=cpu:²"], "there is no topology"),
        (["--topology=cpu:4", "--num_slices=2"], "cpu devices have no slices"),
        (["--topology=gpu:h100:2x1x4", "--num_slices=2"], "leave one of them out"),
        (["--topology=gpu:h100:999999x8"], "devices"),
        (["--topology=cpu:4", "--example=x=object[3] y=int32[]"], "--example"),
        (["--topology=cpu:4", "--plot=a.jpg"], "PNG"),
        (["--topology=cpu:4", "--batch=auto"], "the memory of cpu devices is unknown"),
        (["--topology=cpu:4", "--example=x=[3]"], "--example"),
        (["--topology=cpu:4", "--compare=v5e:2x2,nonsense"], "'nonsense' is not a topology"),
        (["--topology=cpu:4", "--plot=/nowhere/x.png"], "there is no folder /nowhere"),
        (["--topology=cpu:4", "--efort=full"], "did you mean --effort?"),
        (["--topology=cpu:4", "--config.model.hiden=3"], "the config has no such key"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_plan_is_one_line(plan, arguments, message):
    code, _, err, _ = plan(DIGITS, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_help_imports_no_jax():
    done = subprocess.run(
        [sys.executable, ROOT / "tests/conftest_imports.py", "launcher", "plan", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "--topology=NAME" in done.stdout
    assert done.stderr == ""
