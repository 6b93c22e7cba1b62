"""Renders a report as one page of HTML, which loads nothing and escapes all text of runs."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.report import chart
from launcher.report.assets import SCRIPT, STYLE
from launcher.report.attempts import Attempt
from launcher.report.chart import Line, swatch
from launcher.report.read import Run
from launcher.report.scale import number
from trainer.console import duration, escape

_NONE = "\N{EN DASH}"
_MOST_WARNINGS = 30


def render(runs: Sequence[Run], *, log: bool, made: str) -> str:
    """Renders the page.

    Args:
        runs: one or several runs.
        log: whether the axis of losses is logarithmic.
        made: a line that says when and by what the page was made.
    """
    title = f"Report of {runs[0].name}" if len(runs) == 1 else f"Report of {len(runs)} runs"
    curves, points = _curves(runs, log)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # The browser enforces it, too: nothing is loaded, and no other script runs.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style></head><body>\n"
        f'<header><h1>{_text(title)}</h1><p class="quiet">{_text(made)}</p></header>\n'
        f"<main>{_overview(runs)}{_final_metrics(runs)}{curves}{_failures(runs)}"
        f"{_comparison('Config', runs, lambda run: run.config)}"
        f"{_comparison('Environment', runs, lambda run: run.environment)}</main>\n"
        f'<script type="application/json" id="points">{points}</script>\n'
        f"<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(escape(str(value)))


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    return (
        f'<div class="wide"><table><thead><tr>{"".join(head)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _head(text: str, kind: str = "") -> str:
    return f'<th scope="col" class="{kind}">{text}</th>'


def _cell(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{text or _NONE}</td>'


def _named(runs: Sequence[Run], index: int) -> str:
    return f'<span class="named">{swatch(index)}{_text(runs[index].name)}</span>'


# State of the runs


def _overview(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return _overview_of_one(runs[0])
    head = [_head(name) for name in ("run", "state")]
    head += [_head(name, "number") for name in ("steps", "best", "at step", "time", "attempts")]
    head += [_head(name) for name in ("devices", "jax")]
    rows = []
    for index, run in enumerate(runs):
        best = "" if run.best is None else f"{_text(run.best.tag)} {number(run.best.value)}"
        cells = [
            f'<th scope="row">{_named(runs, index)}</th>',
            _cell(f'<span class="state {run.state}">{_text(run.status)}</span>'),
            _cell(f"{run.steps:,}", "number"),
            _cell(best, "number"),
            _cell("" if run.best is None else f"{run.best.step:,}", "number"),
            _cell(_time(run.seconds), "number"),
            _cell(str(len(run.attempts) or ""), "number"),
            _cell(_text(run.devices), "stamp"),
            _cell(_text(run.environment.get("packages.jax") or ""), "stamp"),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    missing = "".join(
        f'<p class="quiet">{_text(run.name)}: {_missing(run)}</p>' for run in runs if run.missing
    )
    return f"<h2>Runs</h2>{_card(_table(head, rows) + missing)}"


def _overview_of_one(run: Run) -> str:
    best = "" if run.best is None else f"{number(run.best.value)}"
    at = "" if run.best is None else f"{_text(run.best.tag)} at step {run.best.step:,}"
    started = run.attempts[0].started if run.attempts else ""
    packages = {name: run.environment.get(f"packages.{name}") for name in ("jax", "podlift")}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    kept = ", ".join(f"{step:,}" for step in run.checkpoints)
    facts = [
        ("state", f'<span class="state {run.state}">{_text(run.status)}</span>', ""),
        ("steps", f"{run.steps:,}", f"checkpoints {kept}" if kept else "no checkpoint"),
        ("best", best, at),
        ("time", _time(run.seconds), f"since {_text(started)}" if started else ""),
        ("attempts", str(len(run.attempts) or ""), ""),
        ("devices", _text(run.devices), _text(versions)),
    ]
    boxes = "".join(
        f"<div><dt>{name}</dt><dd>{value or _NONE}<small>{more}</small></dd></div>"
        for name, value, more in facts
    )
    missing = f'<p class="quiet">{_missing(run)}</p>' if run.missing else ""
    return "<h2>Run</h2>" + _card(f'<dl class="facts">{boxes}</dl>{missing}')


def _card(content: str) -> str:
    return f'<section class="card">{content}</section>'


def _missing(run: Run) -> str:
    return f"missing or unreadable: {', '.join(run.missing)}"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


# Metrics


def _tags(runs: Sequence[Run]) -> list[str]:
    """The tags of all runs, in the order of the first run that has each."""
    found = dict.fromkeys(tag for run in runs for tag in run.series)
    return list(found)


def _final_metrics(runs: Sequence[Run]) -> str:
    tags = _tags(runs)
    if not tags:
        return '<h2>Metrics</h2><p class="quiet">No metrics yet.</p>'
    several = len(runs) > 1
    if several:
        head = [_head("last value")]
        head += [_head(_named(runs, index), "number") for index in range(len(runs))]
    else:
        names = ("metric", "last", "lowest", "at step", "highest", "at step")
        head = [_head(name, "number" if index else "") for index, name in enumerate(names)]
    rows = []
    for tag in tags:
        cells = [_cell(_last(run, tag), "number") for run in runs]
        if not several:
            cells += _extremes(runs[0], tag)
        rows.append(f'<tr><th scope="row">{_text(tag)}</th>{"".join(cells)}</tr>')
    return f"<h2>Metrics</h2>{_card(_table(head, rows))}"


def _last(run: Run, tag: str) -> str:
    points = run.series.get(tag)
    if not points:
        return ""
    value = points[-1][1]
    return "not finite" if value is None else number(value)


def _extremes(run: Run, tag: str) -> list[str]:
    """Cells: the lowest value, its step, the highest, its step."""
    finite = [(value, step) for step, value in run.series[tag] if value is not None]
    cells = []
    for pick in (min, max):
        value, step = pick(finite, key=lambda pair: pair[0]) if finite else (None, 0)
        cells.append(_cell("" if value is None else number(value), "number"))
        cells.append(_cell("" if value is None else f"{step:,}", "number"))
    return cells


def _curves(runs: Sequence[Run], log: bool) -> tuple[str, str]:
    """The charts, and the JSON for the script."""
    last_step = max((points[-1][0] for run in runs for points in run.series.values()), default=0)
    figures, hovers = [], []
    for tag in _tags(runs):
        lines = [
            Line(run.name, index, run.series[tag])
            for index, run in enumerate(runs)
            if tag in run.series
        ]
        picture, hover = chart.draw(tag, lines, last_step, log=log and tag.endswith("/loss"))
        legend = "".join(f"<li>{swatch(line.number)}{_text(line.name)}</li>" for line in lines)
        figures.append(
            f'<figure class="chart"><h3>{_text(tag)} <span>by step</span></h3>{picture}'
            f'<figcaption><ul class="legend">{legend}</ul></figcaption></figure>'
        )
        hovers.append(hover)
    data = {"box": [chart.LEFT, chart.RIGHT, chart.WIDTH], "charts": hovers}
    # The points are numbers, but nothing in a script may look like its end.
    points = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<h2>Curves</h2><div class="charts">{"".join(figures)}</div>' if figures else ""
    ), points


# Failures


def _failures(runs: Sequence[Run]) -> str:
    cards = []
    for index, run in enumerate(runs):
        name = f"<h3>{_named(runs, index)}</h3>" if len(runs) > 1 else ""
        cards.append(_card(f"{name}{_failure(run)}{_attempts(run)}{_warnings(run)}"))
    return f"<h2>Failures and restarts</h2>{''.join(cards)}"


def _failure(run: Run) -> str:
    if not run.failure:
        return ""
    about = [
        f"{key} {run.failure[key]}"
        for key in ("rank", "host", "step", "attempt", "time")
        if run.failure.get(key) not in (None, "")
    ]
    return (
        f'<p><span class="state failed">failed</span> '
        f'<span class="quiet">{_text(", ".join(about))}</span></p>'
        f"<pre>{_text(run.failure.get('error', ''))}</pre>"
        f'<p class="quiet">full log: {_text(run.failure.get("log") or _NONE)}</p>'
    )


def _attempts(run: Run) -> str:
    if not run.attempts:
        return '<p class="quiet">No logs.</p>'
    head = [_head("attempt", "number"), _head("started")]
    head += [_head(name, "number") for name in ("time", "processes", "from step", "to step")]
    head += [_head("ended")]
    rows = []
    for attempt in run.attempts:
        is_running = run.state == "running" and attempt is run.attempts[-1]
        cells = [
            _cell(str(attempt.number), "number"),
            _cell(_text(attempt.started), "stamp"),
            _cell(_time(attempt.seconds), "number"),
            _cell(str(attempt.processes), "number"),
            _cell(f"{attempt.first_step:,}", "number"),
            _cell("" if attempt.last_step is None else f"{attempt.last_step:,}", "number"),
            _cell("running" if is_running else _ended(attempt), "ended"),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _table(head, rows)


def _ended(attempt: Attempt) -> str:
    if not attempt.ending:
        return '<span class="stopped">without an error message: killed?</span>'
    first = _text(attempt.ending.splitlines()[0])
    return first if attempt.went_well else f'<span class="failed">{first}</span>'


def _warnings(run: Run) -> str:
    """Warnings, states in quarantine and skipped updates."""
    notes = []
    for attempt in run.attempts:
        for text, count in attempt.warnings.items():
            times = f" ({count} times)" if count > 1 else ""
            notes.append(f"attempt {attempt.number}: {text}{times}")
    if len(notes) > _MOST_WARNINGS:
        notes[_MOST_WARNINGS:] = [f"and {len(notes) - _MOST_WARNINGS} more in the logs"]
    notes += [f"in quarantine: {place}: {why}" for place, why in run.quarantined.items()]
    skipped = [value for _, value in run.series.get("train/skipped", ()) if value]
    if skipped:
        notes.append(f"{number(skipped[-1])} updates were not finite and were skipped")
    if not notes:
        return '<p class="quiet">No warnings, nothing in quarantine.</p>'
    return f'<ul class="notes">{"".join(f"<li>{_text(text)}</li>" for text in notes)}</ul>'


# Config and environment


def _comparison(title: str, runs: Sequence[Run], pick: Callable[[Run], Mapping[str, Any]]) -> str:
    """A table of keys; for several runs, first those that differ."""
    tables = [pick(run) for run in runs]
    keys = sorted(dict.fromkeys(key for table in tables for key in table))
    if not keys:
        return f'<h2>{title}</h2><p class="quiet">Not recorded.</p>'
    rows = {
        key: [_text(_json(table[key])) if key in table else _NONE for table in tables]
        for key in keys
    }
    if len(runs) == 1:
        head = [_head("key"), _head("value")]
        return f"<h2>{title}</h2>{_card(_table(head, [_row(k, v) for k, v in rows.items()]))}"
    head = [_head("key"), *(_head(_named(runs, index)) for index in range(len(runs)))]
    differing = [_row(key, values) for key, values in rows.items() if len(set(values)) > 1]
    shown = (
        _table(head, differing)
        if differing
        else f'<p class="quiet">All {len(rows)} keys are the same.</p>'
    )
    every = _table(head, [_row(key, values) for key, values in rows.items()])
    return (
        f"<h2>{title}</h2>"
        + _card(f"{shown}<details><summary>all {len(rows)} keys</summary>{every}</details>")
    )  # fmt: skip


def _row(key: str, values: Sequence[str]) -> str:
    cells = "".join(f'<td class="value">{value}</td>' for value in values)
    return f'<tr><th scope="row">{_text(key)}</th>{cells}</tr>'


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
