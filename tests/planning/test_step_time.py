"""The model of time, against sums made by hand and against properties that it must have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.planning.chips import CHIPS, STRAGGLERS
from launcher.planning.forecast import largest_batch
from launcher.planning.hlo import Collective
from launcher.planning.step_time import Cluster, Work, alpha_beta, predict, scaling

V5E, H100 = CHIPS["v5e"], CHIPS["h100"]
NOTHING = Work({}, 0.0, ())


def test_a_collective_in_a_slice_and_between_slices():
    alpha, beta = alpha_beta("all-reduce", Cluster(V5E, (4, 4)))
    assert alpha == pytest.approx(V5E.collective_overhead + 2 * (3 + 3) * V5E.link_latency)
    assert beta == pytest.approx(2 * 15 / 16 / V5E.slice_bandwidth((4, 4)))

    ring, _ = alpha_beta("all-reduce", Cluster(V5E, (16, 16)))
    assert ring == pytest.approx(V5E.collective_overhead + 2 * (8 + 8) * V5E.link_latency)

    far_alpha, far_beta = alpha_beta("all-reduce", Cluster(V5E, (4, 4), 8))
    assert far_alpha == pytest.approx(alpha + 2 * 3 * V5E.network_latency)
    # Four hosts a slice, each with its part of the bytes.
    assert far_beta == pytest.approx(beta + 2 * 7 / 8 / (4 * V5E.network_bandwidth))

    gather, _ = alpha_beta("all-gather", Cluster(H100, (8,)))
    assert gather == pytest.approx(H100.collective_overhead + 3 * H100.link_latency)


def test_the_parts_of_the_time_of_a_step():
    work = Work({"bfloat16": 1e12, "float32": 1e11}, 1e9, [Collective("all-reduce", "m", 3, 10**8)])
    there = predict(work, Cluster(H100, (8,), 4))
    peak = 1e12 / H100.flops_bf16 + 1e11 / H100.flops_f32
    assert there.peak_seconds == pytest.approx(peak)
    assert there.compute_seconds == pytest.approx(peak / H100.compute_share)
    alpha, beta = alpha_beta("all-reduce", Cluster(H100, (8,), 4))
    assert there.collective_seconds == pytest.approx(3 * alpha + 10**8 * beta)
    assert there.straggler_seconds == pytest.approx(STRAGGLERS * 2 * there.compute_seconds)
    assert there.bound == "compute"
    assert there.mfu == pytest.approx(peak / there.step_seconds)
    assert predict(Work({}, 1e12, ()), Cluster(H100, (8,))).bound == "memory"


def test_chips_of_two_devices_share_what_they_have():
    v3 = CHIPS["v3"]
    there = predict(Work({"bfloat16": 1e12}, 1e9, ()), Cluster(v3, (2, 2)))
    assert there.peak_seconds == pytest.approx(1e12 / (v3.flops_bf16 / 2))


@pytest.mark.parametrize("name", sorted(CHIPS))
def test_more_chips_never_make_a_step_faster(name):
    work = Work({"bfloat16": 1e12}, 1e10, [Collective("all-reduce", "m", 9, 10**8)])
    chip = CHIPS[name]
    domain = (8,) if chip.torus_axes == 0 else (4,) * chip.torus_axes
    seconds = [there.step_seconds for _, there in scaling(work, Cluster(chip, domain))]
    assert seconds[0] == min(seconds)
    assert seconds[-1] == max(seconds)
    assert [count for count, _ in scaling(work, Cluster(chip, domain))][-2:] == [32768, 50_000]


@given(
    fixed=st.integers(0, 900),
    share=st.floats(0.001, 500),
    start=st.integers(1, 10_000),
    most=st.none() | st.integers(1, 5000),
)
def test_the_largest_batch_was_compiled_and_fits(fixed, share, start, most):
    seen = {}

    def needed(batch):
        assert len(seen) < 60
        seen[batch] = int(fixed + share * batch)
        return seen[batch]

    found = largest_batch(needed, 1000, start, most)
    true = max((b for b in range(1, 1100) if int(fixed + share * b) <= 1000), default=0)
    if share < 1:
        true = int((1001 - fixed) / share)
    true = true if most is None else min(true, most)
    assert found <= true
    assert true - found <= max(1, found // 32) + 1
    assert found == 0 or seen[found] <= 1000
