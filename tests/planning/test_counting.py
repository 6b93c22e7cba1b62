"""What is counted (FLOPs, collectives, arrays), against counts made in other ways."""

import jax
import jax.numpy as jnp
import pytest
from conftest import mesh_of
from jax.sharding import PartitionSpec as P

from launcher.planning.hlo import (
    Collective,
    find_collectives,
    largest_arrays,
    loop_factor,
    module_of,
    size_of,
)
from trainer.step.analysis import count_flops


def flops_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.make_jaxpr(function)(*arguments)).total()


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 3), "padding": "VALID"},
        {"window_strides": (2, 2), "padding": [(3, 2), (0, 1)]},
        {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)},
        {"window_strides": (1, 2), "padding": [(2, 2), (2, 2)], "lhs_dilation": (2, 3)},
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_counts_its_real_products(options, groups):
    image, kernel = (2, 4, 9, 10), (6, 4 // groups, 3, 3)

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, feature_group_count=groups, **options)

    # Of ones, a convolution sums exactly one for each product.
    products = convolve(jnp.ones(image), jnp.ones(kernel)).sum()
    assert flops_of(convolve, image, kernel) == 2 * int(products)


def test_each_gradient_of_a_convolution_costs_what_it_does():
    def loss(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), "SAME").sum()

    shapes = (2, 4, 8, 8), (6, 4, 3, 3)
    forward = flops_of(loss, *shapes)
    assert flops_of(jax.grad(loss, argnums=(0, 1)), *shapes) == 3 * forward


def test_loops_are_multiplied_out_and_branches_are_not_added():
    def layer(x, w):
        return x @ w, None

    def looped(x, ws):
        return jax.lax.scan(layer, x, ws)[0]

    def branching(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    def batched(x, w):
        return jnp.einsum("bij,bjk->bik", x, w)

    assert flops_of(looped, (3, 5), (7, 5, 5)) == 7 * 2 * 3 * 5 * 5
    assert flops_of(branching, (3, 5), (5, 5)) == 2 * 2 * 3 * 5 * 5
    assert flops_of(batched, (4, 2, 3), (4, 3, 5)) == 2 * 4 * 2 * 3 * 5
    assert flops_of(jax.checkpoint(lambda x, w: x @ w), (2, 3), (3, 4)) == 2 * 2 * 3 * 4


def compiled(function, devices, *shapes):
    mapped = jax.shard_map(
        function, mesh=mesh_of(devices), in_specs=P("batch"), out_specs=P(), check_vma=False
    )
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def test_collectives_of_a_compiled_program():
    def step(x):
        with jax.named_scope("Model"), jax.named_scope("Block_0"):
            x = x - jax.lax.pmean(x.mean(axis=0), "batch")
        with jax.named_scope("mean_over_axis"):
            return jax.lax.pmean(x.sum(axis=0), "batch")

    found = find_collectives(compiled(step, 4, (8, 32)))
    assert found == [
        Collective("all-reduce", "Block_0", 1, 32 * 4),
        Collective("all-reduce", "gradients, statistics, metrics", 1, 32 * 4),
    ]


def test_collectives_in_a_loop_count_each_time():
    def step(x):
        def body(carry, _):
            with jax.named_scope("Model"), jax.named_scope("layers"):
                return carry * jax.lax.pmean(carry.sum(), "batch"), None

        return jax.lax.scan(body, x, None, length=6)[0]

    text = compiled(step, 2, (8, 4))
    assert find_collectives(text) == [Collective("all-reduce", "layers", 6, 6 * 4)]
    assert 1 < loop_factor(text) <= 6
    assert loop_factor(compiled(lambda x: jax.lax.psum(x, "batch"), 2, (8, 4))) == 1


TEXT = """HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0), metadata={op_name="jvp(Net)/Block_3/BatchNorm_0/psum"}
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main.9_spmd (p.0: f32[2,8], /*index=1*/p.1: bf16[4]) -> (f32[2,8]) {
  %p.0 = f32[2,8]{1,0:T(2,128)} parameter(0)
  %both = (f32[2,8]{1,0}, /*index=1*/bf16[4]{0}) all-reduce(%p.0, %p.1), channel_id=1, to_apply=%add.1, metadata={op_name="jit(f)/shard_map/jvp(Net)/Block_0/BatchNorm_1/psum"}
  %one = f32[2,8]{1,0} get-tuple-element(%both), index=0, metadata={op_name="jit(f)/shard_map/jvp(Net)/Block_0/BatchNorm_1/psum"}
  %two = bf16[4]{0} get-tuple-element((f32[2,8]{1,0}, bf16[4]{0}) %both), index=1, metadata={op_name="jit(f)/shard_map/transpose(jvp(Net))/Block_1/BatchNorm_0/psum"}
  %start = f32[128]{0} all-reduce-start(%one), channel_id=1, to_apply=%add.1, metadata={scheduling_name="x"}
  %done = f32[128]{0} all-reduce-done(%start)
  %gather = (f32[2]{0}, f32[16]{0}) all-gather-start(%two), dimensions={0}, metadata={op_name="jit(f)/shard_map/mean_over_axis/all_gather"}
  %gathered = f32[16]{0} all-gather-done(%gather)
  ROOT %out = (f32[2,8]{1,0}) tuple(%one)
}
"""  # noqa: E501 (as a compiler prints it)


def test_combined_started_and_nameless_collectives():
    assert find_collectives(TEXT) == [
        Collective("all-reduce", "Block_0/BatchNorm_1", 1, 64),
        Collective("all-reduce", "Block_1/BatchNorm_0", 0, 8),
        Collective("all-reduce", "Block_3/BatchNorm_0", 1, 512, asynchronous=True),
        Collective("all-gather", "gradients, statistics, metrics", 1, 64, asynchronous=True),
    ]
    assert [(a.shape, a.bytes) for a in largest_arrays(TEXT, 1)] == [("f32[128]", 512)]


@pytest.mark.parametrize(
    ("op_name", "module"),
    [
        (
            "jit(_fun)/shard_map/transpose(jvp(ResNet))/Block_2/BatchNorm_1/psum",
            "Block_2/BatchNorm_1",
        ),
        ("jit(f)/jvp(MLP)/psum", "MLP"),
        ("jit(f)/jvp(Net)/while/body/closed_call/Layer/checkpoint/Dense_0/dot", "Layer/Dense_0"),
        ("jit(f)/shard_map/mean_over_axis/psum", "gradients, statistics, metrics"),
        ("jit(f)/jvp(jit(take_along_axis))/gather", "(not attributed)"),
        ("jit(f)/shard_map/psum", "(not attributed)"),
        ("", "(not attributed)"),
    ],
)
def test_a_name_of_xla_to_a_module(op_name, module):
    assert module_of(op_name) == module


def test_sizes_of_shapes():
    assert size_of("f32[2,16]{1,0:T(2,128)}") == 128
    assert size_of("(bf16[3]{0}, pred[5], s4[4], f8e4m3fn[7], token[], u64[])") == 6 + 5 + 2 + 7 + 8
