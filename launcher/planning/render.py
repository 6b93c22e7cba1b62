"""Plans as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.planning.forecast import Forecast
from launcher.planning.hlo import Collective

_MOST_LINES = 14


def render(plans: Sequence[Forecast]) -> str:
    """One plan in full, or several side by side."""
    return _render_plan(plans[0]) if len(plans) == 1 else _render_comparison(plans)


def _render_plan(plan: Forecast) -> str:
    hosts = f", {plan.num_hosts} hosts" if plan.num_hosts > 1 else ""
    kind = plan.topology.chip.device_kind if plan.topology.chip else "CPU, virtual"
    lines = [
        f"plan of {plan.config_name} on {plan.topology.label}: {plan.num_devices:,} "
        f"device{'s' * (plan.num_devices > 1)} "
        f"({kind}{hosts}), lift {plan.lift}"
    ]
    lines += [f"note: {note}" for note in plan.notes]
    batch_note = f", {plan.batch_note}" if plan.batch_note else ""
    state = plan.state
    lines += [
        f"batch            {plan.global_batch:,} examples, {plan.batch:,} per device{batch_note}",
        f"parameters       {state.parameters:,}, {_bytes(state.parameter_bytes)}; optimizer "
        f"{_bytes(state.optimizer_bytes)}, other state {_bytes(state.model_bytes)}; {_where(plan)}",
        "",
        *_memory(plan),
        "",
        *_work(plan),
        "",
        *_collectives(plan),
    ]
    if plan.prediction is not None:
        lines += ["", *_prediction(plan)]
        lines += ["", *_scaling(plan)] if plan.scaling else []
        if not plan.scaling:
            lines.append("  one device: no prediction for more")
    elif plan.fits:
        lines += ["", "no prediction: the speed of these devices is unknown"]
    lines += ["", _compiled(plan)]
    return "\n".join(lines) + "\n"


def _render_comparison(plans: Sequence[Forecast]) -> str:
    """One column per plan."""
    rows: list[list[str]] = [
        ["", *(plan.label for plan in plans)],
        ["devices", *(f"{plan.num_devices:,}" for plan in plans)],
        ["lift", *(plan.lift for plan in plans)],
        ["examples per device", *(f"{plan.batch:,}" for plan in plans)],
        ["global batch", *(f"{plan.global_batch:,}" for plan in plans)],
        ["parameters", *(f"{plan.state.parameters:,}" for plan in plans)],
        ["device memory", *(_bytes(plan.needed) for plan in plans)],
        ["  of", *(_bytes(p.memory_bytes) if p.memory_bytes else "?" for p in plans)],
        ["fits", *("yes" if plan.fits else "NO" for plan in plans)],
        ["FLOPs per device", *(_flops(plan.flops) for plan in plans)],
        ["memory traffic", *(_bytes(plan.program.bytes_accessed) for plan in plans)],
        ["collectives", *(_count_and_bytes(plan.program.collectives) for plan in plans)],
        ["state", *(plan.state_sharding for plan in plans)],
        ["predicted:", *("" for _ in plans)],
    ]
    predictions = [plan.prediction for plan in plans]
    rows += [
        ["  step", *(_seconds(p.step_seconds) if p else "-" for p in predictions)],
        ["  bound by", *(p.bound if p else "-" for p in predictions)],
        ["  collectives", *(_seconds(p.collective_seconds) if p else "-" for p in predictions)],
        [
            "  of which sync BN",
            *(_seconds(plan.sync_bn_seconds) if plan.prediction else "-" for plan in plans),
        ],
        [
            "  examples/s",
            *(
                f"{plan.global_batch / p.step_seconds:,.0f}" if p else "-"
                for plan, p in zip(plans, predictions, strict=True)
            ),
        ],
        ["  MFU", *(f"{p.mfu:.1%}" if p else "-" for p in predictions)],
        ["compiled in", *(_seconds(plan.program.compile_seconds) for plan in plans)],
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = ""
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        text += "  ".join(cells).rstrip() + "\n"
    for note in dict.fromkeys(f"note on {p.topology.label}: {p.note}" for p in plans if p.note):
        text += f"{note}\n"
    return text


def to_json(plan: Forecast) -> dict[str, Any]:
    """One plan in plain values: bytes, seconds and FLOPs of one device."""
    prediction = plan.prediction
    return {
        "label": plan.label,
        "config": plan.config_name,
        "topology": plan.topology.name,
        "num_slices": plan.topology.num_slices,
        "lift": plan.lift,
        "state_sharding": plan.state_sharding,
        "devices": plan.num_devices,
        "hosts": plan.num_hosts,
        "batch_per_device": plan.batch,
        "global_batch_size": plan.global_batch,
        "parameters": plan.state.parameters,
        "parameter_bytes": plan.state.parameter_bytes,
        "optimizer_bytes": plan.state.optimizer_bytes,
        "model_state_bytes": plan.state.model_bytes,
        "state_bytes_saved": plan.state.saved_bytes,
        "gathered_bytes": plan.gathered_bytes,
        "fits": plan.fits,
        "peak_bytes": plan.needed,
        "hbm_bytes": plan.memory_bytes,
        "argument_bytes": plan.program.arguments,
        "aliased_bytes": plan.program.aliased,
        "temporary_bytes": plan.program.temporaries,
        "described_batch_per_device": plan.program.batch,
        "flops": plan.flops,
        "bytes_accessed": plan.program.bytes_accessed,
        "largest_arrays": [dataclasses.asdict(array) for array in plan.largest_arrays],
        "collectives": [dataclasses.asdict(item) for item in plan.program.collectives],
        "predicted": {
            "step_seconds": prediction.step_seconds if prediction else None,
            "examples_per_second": plan.global_batch / prediction.step_seconds
            if prediction
            else None,
            "mfu": prediction.mfu if prediction else None,
            "bound": prediction.bound if prediction else None,
            "compute_seconds": prediction.compute_seconds if prediction else None,
            "memory_seconds": prediction.memory_seconds if prediction else None,
            "collective_seconds": prediction.collective_seconds if prediction else None,
            "straggler_seconds": prediction.straggler_seconds if prediction else None,
            "sync_bn": plan.sync_bn,
            "sync_bn_seconds": plan.sync_bn_seconds if prediction else None,
        },
        "scaling": [
            {
                "chips": chips,
                "step_seconds": there.step_seconds,
                "efficiency": _efficiency(plan, there.step_seconds),
            }
            for chips, there in plan.scaling
        ],
        "compile_seconds": plan.program.compile_seconds,
        "cached": plan.program.cached,
        "note": plan.note,
    }


def write_json(path: str, plans: Sequence[Forecast]) -> None:
    """One plan as an object; several as `{"plans": [...]}`."""
    found = [to_json(plan) for plan in plans]
    value = found[0] if len(found) == 1 else {"plans": found}
    Path(path).write_text(json.dumps(value, indent=1) + "\n")


def _where(plan: Forecast) -> str:
    if plan.state_sharding == "replicated":
        return "replicated on every device"
    return (
        f"per device\n{'':16} {_bytes(plan.state.saved_bytes)} less than replicated, for "
        f"{_bytes(plan.gathered_bytes)} of all-gathers per step"
    )


def _memory(plan: Forecast) -> list[str]:
    program = plan.program
    if plan.memory_bytes is None:
        first = f"device memory    {_bytes(plan.needed)}"
    else:
        first = (
            f"device memory    {_bytes(plan.needed)} of {_bytes(plan.memory_bytes)}  "
            f"{_bar(plan.needed / plan.memory_bytes)}"
        )
    if plan.fits and program.fits:
        close = "  close: --effort=full compiles as a run would"
        return [
            first,
            *([close] if plan.is_close else []),
            f"  state, batch   {_bytes(program.arguments)}, of which {_bytes(program.aliased)} "
            "are donated",
            f"  temporaries    {_bytes(program.temporaries)}",
            f"  largest        {_largest(plan)}",
        ]
    return [
        first,
        "  DOES NOT FIT. The largest arrays of the step:",
        *(f"    {_bytes(a.bytes):>10}  {a.source}" for a in plan.largest_arrays),
        *(f"  HINT: {hint}" for hint in _hints(plan)),
    ]


def _hints(plan: Forecast) -> list[str]:
    assert plan.memory_bytes is not None
    hints = []
    fixed = plan.state.parameter_bytes + plan.state.optimizer_bytes
    if fixed > plan.memory_bytes / 2:
        hints.append(
            f"parameters and optimizer alone take {_bytes(fixed)} of every device: "
            "config.state_sharding=zero1 or fsdp, an optimizer with less state, or a chip with "
            "more memory"
        )
    if plan.batch > 1:
        guess = max(1, int(plan.batch * plan.memory_bytes / plan.needed * 0.9))
        hints.append(
            f"fewer examples per device: about {guess:,} may fit, --batch=auto finds the most"
        )
    if any("f32[" in array.shape for array in plan.largest_arrays):
        hints.append("activations are float32: computing in bfloat16 halves them")
    hints.append("nn.remat around the blocks of the model: activations are recomputed, not kept")
    return hints


def _largest(plan: Forecast) -> str:
    return "; ".join(f"{_bytes(a.bytes)} {a.source}" for a in plan.largest_arrays[:2]) or "-"


def _work(plan: Forecast) -> list[str]:
    traffic = plan.program.bytes_accessed
    if plan.program.batch != plan.batch:
        return [f"work per step    {_flops(plan.flops)} per device"]
    intensity = f", {plan.flops / traffic:.0f} FLOPs per byte" if traffic else ""
    chip = plan.topology.chip
    balance = f" (the chip: {chip.flops_bf16 / chip.memory_bandwidth:.0f})" if chip else ""
    return [
        f"work per step    {_flops(plan.flops)} and {_bytes(traffic)} of memory traffic per device"
        f"{intensity}{balance}"
    ]


def _collectives(plan: Forecast) -> list[str]:
    collectives = plan.program.collectives
    lines = [f"collectives      {'count':>7}  {'bytes':>10}"]
    if not collectives:
        return ["collectives      none"]
    groups: dict[tuple[str, str], list[Collective]] = {}
    names = [item.module for item in collectives]
    few = len(set(names)) <= _MOST_LINES
    for item in collectives:
        # Many modules are grouped by block.
        name = item.module if few else item.module.split("/")[0]
        groups.setdefault((item.kind, name), []).append(item)
    shown = sorted(groups.items(), key=lambda group: -sum(c.bytes for c in group[1]))
    for (kind, name), items in shown[:_MOST_LINES]:
        lines.append(_line_of(f"{name}, {kind}", items))
    if len(shown) > _MOST_LINES:
        rest = [item for _, items in shown[_MOST_LINES:] for item in items]
        lines.append(_line_of(f"{len(shown) - _MOST_LINES} more", rest))
    lines.append(_line_of("in total", list(collectives)))
    batch_norm = [item for item in collectives if plan.is_batch_norm(item)]
    if batch_norm:
        lines.append(_line_of("of which batch normalisation", batch_norm))
    return lines


def _line_of(name: str, items: Sequence[Collective]) -> str:
    count = sum(item.count for item in items)
    size = _bytes(sum(item.bytes for item in items))
    return f"  {'':14} {count:>7,}  {size:>10}  {name if len(name) < 60 else f'{name[:57]}...'}"


def _prediction(plan: Forecast) -> list[str]:
    prediction = plan.prediction
    assert prediction is not None
    step = prediction.step_seconds
    rate = plan.global_batch / step
    longest = max(
        prediction.compute_seconds, prediction.memory_seconds, prediction.collective_seconds
    )

    def row(name: str, seconds: float, note: str = "") -> str:
        return f"  {name:14} {_seconds(seconds):>9}  {'#' * round(24 * seconds / longest)}{note}"

    sync = [item for item in plan.program.collectives if plan.is_batch_norm(item)]
    lines = [
        "predicted, not measured (see docs/plan.md for the accuracy):",
        row("compute", prediction.compute_seconds),
        row("memory", prediction.memory_seconds),
        row("collectives", prediction.collective_seconds),
    ]
    if sync and plan.sync_bn_seconds:
        small = f"{sum(item.count for item in sync)} small ones in sequence"
        what = f"{small}: latency, not bytes" if plan.sync_bn else "left out: --nosync_bn"
        lines.append(f"    sync BN      {_seconds(plan.sync_bn_seconds):>9}  {what}")
    if prediction.straggler_seconds:
        lines.append(row("stragglers", prediction.straggler_seconds))
    lines.append(
        f"  step           {_seconds(step):>9}  bound by {prediction.bound}; {rate:,.0f} "
        f"examples/s, {rate / plan.num_devices:,.0f} per device; MFU {prediction.mfu:.1%}"
    )
    if plan.examples:
        epoch = max(1, plan.examples // plan.global_batch)
        lines.append(
            f"  run            {_seconds(plan.num_steps * step):>9}  {plan.num_steps:,} steps; an "
            f"epoch of {plan.examples:,} examples takes {_seconds(epoch * step)}"
        )
    return lines


def _scaling(plan: Forecast) -> list[str]:
    lines = ["predicted for other sizes, with the same batch per device:"]
    devices_per_chip = plan.topology.chip.devices_per_chip if plan.topology.chip else 1
    for chips, there in plan.scaling:
        devices = chips * devices_per_chip
        here = "  <- this plan" if devices == plan.num_devices else ""
        lines.append(
            f"  {chips:>7,} chips  {_seconds(there.step_seconds):>9}  "
            f"{devices * plan.batch / there.step_seconds:>14,.0f} examples/s  "
            f"{_efficiency(plan, there.step_seconds):>6.1%}{here}"
        )
    return lines


def _efficiency(plan: Forecast, step_seconds: float) -> float:
    """Relative to one chip with the same batch per device."""
    return plan.scaling[0][1].step_seconds / step_seconds


def _compiled(plan: Forecast) -> str:
    how = ", cached by an earlier plan" if plan.program.cached else ""
    return f"compiled in {_seconds(plan.program.compile_seconds)}{how}"


def _count_and_bytes(collectives: Sequence[Collective]) -> str:
    count = sum(item.count for item in collectives)
    return f"{count} x, {_bytes(sum(item.bytes for item in collectives))}"


def _bar(share: float, width: int = 30) -> str:
    full = min(width, round(share * width))
    return f"[{'#' * full}{'.' * (width - full)}] {share:.0%}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _flops(count: float) -> str:
    for unit in ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} PFLOPs"


def _seconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
