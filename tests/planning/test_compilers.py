"""Plans with the real compilers of TPUs and GPUs."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, wide
from plans import (
    DIGITS,
    RESNET,
    UPDATE_BYTES,
    bytes_of,
    make_plan,
    needs_gpu_compiler,
    needs_tpu_compiler,
)

slow = pytest.mark.slow


@pytest.fixture
def plan(tmp_path):
    return make_plan(tmp_path)


# The two larger kernels of the MLP, which are sharded; Adam has two numbers per parameter.
SHARDED_BYTES = 4 * (64 * 128 + 128 * 128)


@pytest.mark.parametrize(
    ("topology", "compilers"),
    [
        ("v5e:2x2", False),
        pytest.param("v5e:2x2", True, marks=[needs_tpu_compiler, pytest.mark.wide]),
        pytest.param("gpu:h100:1x1x4", True, marks=[needs_gpu_compiler, pytest.mark.wide]),
    ],
)
def test_a_state_that_is_sharded_over_the_devices(plan, topology, compilers):
    code, out, err, found = plan(
        DIGITS,
        f"--topology={topology}",
        "--compare=replicated,zero1,fsdp,pmap",
        compilers=compilers,
    )
    assert code == 0, err
    assert out.splitlines()[0].split() == ["replicated", "zero1", "fsdp", "pmap"]
    replicated, zero1, fsdp, pmap = found["plans"]
    assert pmap["state_sharding"] == "replicated"
    assert replicated["state_bytes_saved"] == replicated["gathered_bytes"] == 0
    for sharded, kinds in ((zero1, 2), (fsdp, 3)):
        assert sharded["state_bytes_saved"] == kinds * SHARDED_BYTES * 3 // 4
        assert (
            replicated["argument_bytes"] - sharded["argument_bytes"] == sharded["state_bytes_saved"]
        )
        # Parameters are gathered once, and by some compilers again for the backward pass.
        assert sharded["gathered_bytes"] in (SHARDED_BYTES, SHARDED_BYTES + 4 * 128 * 128)
        summed = bytes_of(sharded, "gradients, statistics, metrics")
        assert summed == pytest.approx(
            bytes_of(replicated, "gradients, statistics, metrics"), rel=0.01
        )


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
