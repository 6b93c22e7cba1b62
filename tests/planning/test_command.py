"""`python -m launcher plan`, from the command line to its answers, with real compilers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, skip_here, wide

slow = pytest.mark.slow
needs_tpu_compiler = skip_here(
    "" if importlib.util.find_spec("libtpu") else "scripts/setup.sh tpu was not run"
)
needs_gpu_compiler = skip_here(
    "" if Path(sys.prefix, "plan-gpu").is_dir() else "scripts/setup.sh plan-gpu was not run"
)

DIGITS = f"--config={ROOT}/configs/digits.py"
RESNET = f"{DIGITS}:resnet"
# What is reduced at the end: gradients of 77,754 parameters, mean and variance of 336 normalised
# features, the sums of loss and accuracy and their count. The offset of a shortcut's normalisation
# (32 and 64 features) has the same gradient as that of the block it is added to: reduced once.
UPDATE_BYTES = 4 * (77_754 - 32 - 64 + 2 * 336 + 3)

# Hides the compilers, as on a machine where only podlift is installed.
WITHOUT_COMPILERS = """
import importlib.util, sys
from launcher.planning import devices
devices.has_compiler = lambda topology: False
from launcher.cli.plan import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def plan(tmp_path):
    """Plans in a process of its own; returns (exit code, stdout, stderr, JSON)."""

    def run(*arguments, compilers=True, cwd=ROOT, cache=tmp_path / "cache"):
        how = ["-m", "launcher", "plan"] if compilers else ["-c", WITHOUT_COMPILERS]
        path = tmp_path / "plan.json"
        path.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, *how, *arguments, f"--json={path}"],
            cwd=cwd,
            env={
                **{k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")},
                "PYTHONPATH": str(ROOT),
                "XDG_CACHE_HOME": str(cache),
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        found = json.loads(path.read_text()) if path.exists() else None
        return done.returncode, done.stdout, done.stderr, found

    return run


def bytes_of(found, module=None):
    return sum(c["bytes"] for c in found["collectives"] if module in (None, c["module"]))


# The two larger kernels of the MLP, which are cut over the devices; Adam has two numbers for each.
CUT_BYTES = 4 * (64 * 128 + 128 * 128)


@pytest.mark.parametrize(
    ("topology", "compilers"),
    [
        ("v5e:2x2", False),
        pytest.param("v5e:2x2", True, marks=[needs_tpu_compiler, pytest.mark.wide]),
        pytest.param("gpu:h100:1x1x4", True, marks=[needs_gpu_compiler, pytest.mark.wide]),
    ],
)
def test_a_state_that_is_cut_over_the_devices(plan, topology, compilers):
    code, out, err, found = plan(
        DIGITS,
        f"--topology={topology}",
        "--compare=replicated,zero1,fsdp,pmap",
        compilers=compilers,
    )
    assert code == 0, err
    assert out.splitlines()[0].split() == ["replicated", "zero1", "fsdp", "pmap"]
    whole, zero1, fsdp, pmap = found["plans"]
    assert pmap["state_sharding"] == "replicated"
    assert whole["state_bytes_saved"] == whole["gathered_bytes"] == 0
    for cut, kinds in ((zero1, 2), (fsdp, 3)):
        assert cut["state_bytes_saved"] == kinds * CUT_BYTES * 3 // 4
        assert whole["argument_bytes"] - cut["argument_bytes"] == cut["state_bytes_saved"]
        # Parameters are put together once, or where a compiler keeps to it, once more to go back.
        assert cut["gathered_bytes"] in (CUT_BYTES, CUT_BYTES + 4 * 128 * 128)
        summed = bytes_of(cut, "gradients, statistics, metrics")
        assert summed == pytest.approx(bytes_of(whole, "gradients, statistics, metrics"), rel=0.01)


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


@pytest.mark.wide
@needs_tpu_compiler
def test_the_tpu_compiler_and_fake_devices_agree_about_the_program(plan):
    code, _, err, real = plan(RESNET, "--topology=v5e:2x2")
    assert code == 0, err
    _, _, _, fake = plan(RESNET, "--topology=v5e:2x2", compilers=False)
    assert real["note"] == ""
    assert bytes_of(real) == bytes_of(fake)
    assert bytes_of(real, "gradients, statistics, metrics") == UPDATE_BYTES
    for key in ("parameters", "optimizer_bytes", "flops", "devices"):
        assert real[key] == fake[key]
    assert real["aliased_bytes"] > 0.9 * real["argument_bytes"]  # the state is donated


@needs_tpu_compiler
def test_a_second_plan_asks_no_compiler_and_the_lifts_are_alike(plan):
    _, _, _, first = plan(DIGITS, "--topology=v5e:2x2")
    _, _, _, again = plan(DIGITS, "--topology=v5e:2x2")
    assert not first["cached"]
    assert again["cached"]
    del first["cached"], again["cached"]
    assert again == first
    _, _, _, other = plan(DIGITS, "--topology=v5e:2x2", "--config.model.hidden_size=100")
    assert not other["cached"]
    code, out, err, found = plan(DIGITS, "--topology=v5e:2x2", "--compare=pmap,shard_map,vmap:4")
    assert code == 0, err
    assert out.splitlines()[0].split() == ["pmap", "shard_map", "vmap:4"]
    one, two, simulated = found["plans"]
    assert (simulated["devices"], simulated["collectives"], simulated["scaling"]) == (1, [], [])
    assert simulated["flops"] == 4 * one["flops"]
    assert (one["flops"], one["collectives"]) == (two["flops"], two["collectives"])
    assert one["peak_bytes"] == pytest.approx(two["peak_bytes"], rel=0.05)


@pytest.mark.wide
@needs_gpu_compiler
def test_gpus_of_several_hosts(plan):
    code, _, err, found = plan(RESNET, "--topology=gpu:h100:2x4", "--batch=32")
    assert code == 0, err
    assert (found["devices"], found["hosts"], found["note"]) == (8, 2, "")
    assert found["global_batch_size"] == 256
    assert bytes_of(found, "gradients, statistics, metrics") == pytest.approx(
        UPDATE_BYTES, rel=0.01
    )
    assert any(c["asynchronous"] for c in found["collectives"])
    assert found["bytes_accessed"] > 0
    assert found["peak_bytes"] > found["argument_bytes"]


@needs_tpu_compiler
@pytest.mark.parametrize("topology", ["v5p:2x2x1", wide("tpu7x:2x2x1"), wide("v3:2x2")])
def test_every_chip_reduces_the_same_bytes(plan, topology):
    code, _, err, found = plan(DIGITS, f"--topology={topology}", "--batch=512")
    assert code == 0, err
    # An MLP of 26,634 parameters with 2 * 128 normalised features, and three sums.
    assert bytes_of(found, "gradients, statistics, metrics") == 4 * (26_634 + 2 * 256 + 3)


@pytest.mark.wide
@needs_tpu_compiler
def test_several_slices_cost_what_scaling_says_and_have_their_names(plan):
    _, _, _, one = plan(RESNET, "--topology=v5e:16x16", "--batch=4")
    code, out, err, two = plan(RESNET, "--topology=v5e:16x16", "--batch=4", "--num_slices=2")
    assert code == 0, err
    assert (two["devices"], two["hosts"], two["num_slices"]) == (512, 128, 2)
    assert two["collectives"] == one["collectives"]
    beyond = next(row for row in one["scaling"] if row["chips"] == 512)
    assert two["predicted"]["step_seconds"] == pytest.approx(beyond["step_seconds"])
    assert "one of 2 slices" in out


@slow
@needs_tpu_compiler
def test_resnet_50_on_256_chips(plan):
    code, out, err, found = plan(
        f"--config={ROOT}/configs/imagenet_resnet50.py", "--topology=v5e:16x16", "--batch=128"
    )
    assert code == 0, err
    assert found["parameters"] == 25_557_032
    assert (found["devices"], found["hosts"]) == (256, 64)
    # As above: gradients without four shortcuts' offsets, statistics of 26,560 features, sums.
    update = 4 * (25_557_032 - (256 + 512 + 1024 + 2048) + 2 * 26_560 + 3)
    assert bytes_of(found, "gradients, statistics, metrics") == update
    # A mean and a mean square of every feature, forwards; two sums of every one, backwards.
    assert bytes_of(found) - update == pytest.approx(4 * 4 * 26_560, rel=0.01)
    assert found["flops"] == pytest.approx(128 * resnet50_flops(), rel=0.05)
    # As a full compilation has it, which takes minutes.
    recorded = json.loads((ROOT / "benchmarks/results/plan.json").read_text())
    assert found["peak_bytes"] == pytest.approx(recorded["full"]["peak_bytes"], rel=0.055)
    assert "64 hosts" in out


def resnet50_flops():
    """Of a training step and one image, from the shapes in He et al.'s table 1."""
    layers = [(112, 7, 3, 64)]  # side of the output, of the kernel, features in and out
    side, inputs = 56, 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        features = 64 * 2**stage
        for block in range(blocks):
            halved = side // 2 if stage and not block else side
            layers += [(side, 1, inputs, features), (halved, 3, features, features)]
            layers += [(halved, 1, features, 4 * features)]
            if not block:
                layers += [(halved, 1, inputs, 4 * features)]
            side, inputs = halved, 4 * features
    forward = [2 * out**2 * kernel**2 * a * b for out, kernel, a, b in layers]
    # Backwards twice as much, but nobody asks for the gradient of an image.
    return 3 * (sum(forward) + 2 * 2048 * 1000) - forward[0]


@pytest.mark.wide
@needs_tpu_compiler
def test_quick_and_full_compilations_agree_about_memory(plan):
    arguments = (RESNET, "--topology=v5e:2x2", "--batch=64")
    _, _, err, quick = plan(*arguments)
    assert quick, err
    _, _, _, full = plan(*arguments, "--effort=full")
    assert quick["peak_bytes"] == pytest.approx(full["peak_bytes"], rel=0.05)
    assert quick["collectives"] == full["collectives"]


@needs_tpu_compiler
def test_out_of_memory_is_an_answer(plan):
    code, out, err, found = plan(
        DIGITS, "--topology=v5e:2x2", "--batch=16000000", "--example=x=float32[64] y=int32[]"
    )
    assert code == 0, err
    assert found["fits"] is False
    assert found["peak_bytes"] > found["hbm_bytes"]
    assert found["predicted"]["step_seconds"] is None
    assert found["largest_arrays"][0]["bytes"] >= 16_000_000 * 64 * 4
    assert "DOES NOT FIT" in out
    assert "--batch=auto" in out


@slow
@needs_tpu_compiler
def test_the_most_that_fit(plan):
    config = [DIGITS, "--topology=v5e:2x2", "--example=x=float32[64] y=int32[]"]
    code, out, err, found = plan(*config, "--batch=auto")
    assert code == 0, err
    most = found["batch_per_device"]
    assert 0.88 * found["hbm_bytes"] < found["peak_bytes"] <= 0.94 * found["hbm_bytes"]
    assert "the most that fit" in out
    _, _, _, larger = plan(*config, f"--batch={most + most // 8}")
    assert larger["fits"] is False


@needs_tpu_compiler
def test_plans_do_not_lock_each_other_out(tmp_path):
    commands = [
        [sys.executable, "-m", "launcher", "plan", DIGITS, f"--topology={name}"]
        for name in ("v5e:2x2", "v6e:2x2")
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen(c, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err


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
    assert code == 2, err  # a keyword that the model does not take is told first
    own(tmp_path)
    code, _, err, _ = plan("--config=own.py", "--topology=cpu:4", cwd=tmp_path)
    assert code == 1
    assert "mine.py:8, in __call__: return y @ y  # a mistake" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "told"),
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
def test_what_a_person_got_wrong_is_one_line(plan, arguments, told):
    code, _, err, _ = plan(DIGITS, *arguments)
    assert code == 2
    assert told in err
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
