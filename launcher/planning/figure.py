"""Plans as a picture (memory, roofline, scaling) and as a page that opens offline."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.planning.chips import Chip
from launcher.planning.forecast import Forecast
from trainer.errors import UserError

_COLOURS = ("#1f5fa8", "#d1730f", "#2e8b57", "#8a4fa3", "#a83232")
_GREY = "#8a8a8a"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64em; margin: 2em auto; padding: 0 1em; }}
img {{ max-width: 100%; }}
pre {{ overflow-x: auto; background: #f5f5f5; padding: 1em; font-size: 13px; }}
</style></head><body>
<h1>{title}</h1>
<img alt="{alt}" src="data:image/png;base64,{image}">
<pre>{text}</pre>
</body></html>
"""


def check_available() -> None:
    """Raises a UserError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("a picture needs matplotlib", 'pip install "podlift[plan]"')


def write_png(path: str, plans: Sequence[Forecast]) -> None:
    """Draws plans side by side into a PNG."""
    Path(path).write_bytes(_draw(plans))


def write_html(path: str, plans: Sequence[Forecast], text: str) -> None:
    """Writes the picture and the text into one self-contained page."""
    title = f"Plan of {plans[0].config_name} on {', '.join(plan.topology.label for plan in plans)}"
    page = _PAGE.format(
        title=html.escape(title),
        alt="device memory, roofline and predicted scaling",
        image=base64.b64encode(_draw(plans)).decode(),
        text=html.escape(text),
    )
    Path(path).write_text(page, encoding="utf-8")


def _draw(plans: Sequence[Forecast]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (memory, roofline, scaling) = plt.subplots(
            1, 3, figsize=(12, 3.8), layout="constrained"
        )
        _draw_memory(memory, plans)
        _draw_roofline(roofline, plans)
        _draw_scaling(scaling, plans)
        names = list(dict.fromkeys(plan.config_name for plan in plans))
        figure.suptitle(f"{', '.join(names)}: predicted, not measured", fontsize=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": ""})
        plt.close(figure)
    return buffer.getvalue()


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _draw_memory(axes: Any, plans: Sequence[Forecast]) -> None:
    gib = 2.0**30
    for index, plan in enumerate(plans):
        arguments = min(plan.program.arguments, plan.needed) if plan.fits else 0
        axes.barh(index, arguments / gib, color=_colour(index), height=0.5)
        axes.barh(
            index,
            (plan.needed - arguments) / gib,
            left=arguments / gib,
            color=_colour(index),
            alpha=0.55,
            height=0.5,
        )
        if plan.memory_bytes:
            total = plan.memory_bytes / gib
            axes.barh(index, total, color="none", edgecolor=_GREY, height=0.5)
            verdict = f"{plan.needed / plan.memory_bytes:.0%}" + ("" if plan.fits else ": too much")
            axes.text(max(total, plan.needed / gib) * 1.02, index, verdict, va="center")
    axes.set_yticks(range(len(plans)), [f"{p.label}\n{p.batch:,} per device" for p in plans])
    axes.set_ylim(max(len(plans), 2) - 0.5, -0.5 - (len(plans) == 1))
    axes.margins(x=0.2)
    axes.set_xlabel("GiB (dark: state and batch; light: temporaries; frame: the device)")
    axes.set_title("device memory")


def _draw_roofline(axes: Any, plans: Sequence[Forecast]) -> None:
    shown = [(i, p, p.topology.chip) for i, p in enumerate(plans) if p.prediction]
    axes.set_title("roofline of one device")
    if not shown:
        axes.text(0.5, 0.5, "no prediction", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    at = [p.flops / p.program.bytes_accessed for _, p, _ in shown if p.program.bytes_accessed]
    left, right = min([1.0, *at]) / 4, max([1000.0, *at]) * 4
    drawn: set[str] = set()
    for index, plan, chip in shown:
        assert isinstance(chip, Chip)
        assert plan.prediction is not None
        peak = chip.flops_bf16 / chip.devices_per_chip
        bandwidth = chip.memory_bandwidth / chip.devices_per_chip
        if chip.name not in drawn:
            corner = peak / bandwidth
            axes.plot(
                [left, corner, right],
                [left * bandwidth / 1e12, peak / 1e12, peak / 1e12],
                color=_GREY,
                linewidth=1,
            )
            axes.text(right, peak / 1e12 * 1.1, f"{chip.name}, bfloat16", ha="right", color=_GREY)
            drawn.add(chip.name)
        intensity = plan.flops / max(plan.program.bytes_accessed, 1.0)
        reached = plan.flops / plan.prediction.step_seconds / 1e12
        axes.plot([intensity], [reached], "o", color=_colour(index), label=plan.label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte of memory traffic")
    axes.set_ylabel("TFLOP/s")
    if len(shown) > 1:
        axes.legend(frameon=False)


def _draw_scaling(axes: Any, plans: Sequence[Forecast]) -> None:
    axes.set_title("scaling with the same batch per device")
    for index, plan in enumerate(plans):
        if not plan.scaling:
            continue
        first = plan.scaling[0][1].step_seconds
        chips = [count for count, _ in plan.scaling]
        share = [100 * first / there.step_seconds for _, there in plan.scaling]
        axes.plot(chips, share, "-", color=_colour(index), label=plan.label)
        here = [c for c in chips if c == plan.topology.num_chips]
        axes.plot(here, [share[chips.index(c)] for c in here], "o", color=_colour(index))
    if not axes.lines:
        axes.text(0.5, 0.5, "no prediction", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    axes.set_xscale("log")
    axes.set_ylim(0, 105)
    axes.set_xlabel("chips")
    axes.set_ylabel("% of one chip's throughput per chip")
    if len(plans) > 1:
        axes.legend(frameon=False)
