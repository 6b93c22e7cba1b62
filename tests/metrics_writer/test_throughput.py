"""How fast a run is, against counts by hand; on chips that are not here, by their names."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from conftest import mesh_of
from runs import digits, read_tensorboard

import trainer
from trainer.metrics_writer import chip_peaks as peaks
from trainer.metrics_writer.chip_peaks import Peak, utilization
from trainer.metrics_writer.messages import describe_chips, describe_rate
from trainer.metrics_writer.throughput import Throughput, memory_tags


def chips(kind, count, cores=1):
    return [
        SimpleNamespace(id=n, device_kind=kind, coords=(n // cores, 0, 0)) for n in range(count)
    ]


@pytest.mark.parametrize(
    ("kind", "dtype", "cores", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 1, 989e12),
        ("NVIDIA H100 80GB HBM3", "float32", 1, 494e12),
        ("TPU v5 lite", "float32", 1, 197e12),
        ("TPU v3", "bfloat16", 2, 123e12 / 2),  # of a core, which jax calls a device
    ],
)
def test_utilization_is_a_part_of_the_peak_of_all_chips(kind, dtype, cores, peak):
    assert utilization({dtype: 4 * 3.0 * peak / 2}, 3.0, chips(kind, 4, cores)) == pytest.approx(
        0.5
    )


def test_utilization_is_not_guessed():
    assert utilization({"float32": 1e12}, 1.0, chips("cpu", 2)) is None
    assert utilization({"float64": 1e12}, 1.0, chips("TPU v4", 2)) is None
    mixed = [*chips("TPU v4", 1), *chips("TPU v3", 1)]
    assert utilization({"float32": 1e12}, 1.0, mixed) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("lift", ["pmap", "vmap"])
def test_speed_is_in_tensorboard_only(tmp_path, monkeypatch, capsys, lift):
    monkeypatch.setitem(peaks.PEAKS, "cpu", Peak(half=1e12, single=1e12))
    told = Throughput.tags

    def counted(speed, seconds):
        speed.counting.join()
        return told(speed, seconds)

    monkeypatch.setattr(Throughput, "tags", counted)
    config = digits(20, lift=lift, steps_per_call=5)
    trainer.train(config, tmp_path / "run", mesh_of(4))
    scalars, _ = read_tensorboard(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "train/step_seconds" in row)
    assert not {"train/mfu", "train/examples_per_second_per_device"} & set().union(*rows)

    devices = 1 if lift == "vmap" else 4
    rate = scalars["train/examples_per_second_per_device", row["step"]]
    assert rate == pytest.approx(row["train/examples_per_second"] / devices, rel=1e-5)
    # Each kernel multiplies forward, for its own gradient, and, all but the first, for its input's.
    first, second, third = 64 * 16, 16 * 16, 16 * 10
    flops = 2 * config.global_batch_size * (2 * first + 3 * second + 3 * third)
    mfu = flops / (devices * 1e12) / row["train/step_seconds"]
    assert scalars["train/mfu", row["step"]] == pytest.approx(mfu, rel=1e-4)
    assert f"mfu {mfu:.1%}" in capsys.readouterr().out


def test_memory_is_that_of_the_fullest_device():
    def device(stats):
        return SimpleNamespace(memory_stats=lambda: stats)

    gib = 2**30
    full = {"bytes_in_use": 2 * gib, "peak_bytes_in_use": 9 * gib, "bytes_limit": 16 * gib, "x": 1}
    tags = memory_tags([device(None), device({**full, "peak_bytes_in_use": 3 * gib}), device(full)])
    assert tags == {
        "memory/bytes_in_use": 2 * gib,
        "memory/peak_bytes_in_use": 9 * gib,
        "memory/bytes_limit": 16 * gib,
    }
    assert describe_chips({"train/mfu": 0.4123, **tags}) == ["mfu 41.2%", "memory 9.0/16.0 GiB"]
    assert memory_tags([device(None)]) == {}
    rate = {"train/examples_per_second": 8000.0, "train/examples_per_second_per_device": 1000.0}
    assert describe_rate(rate, 8) == "8,000 examples/s (1,000 a device)"
    assert describe_rate(rate, 1) == "8,000 examples/s"
