"""Folders of runs for reports, and the elements of a page."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from launcher.report.page import render
from launcher.report.read import read_runs


def make_run(folder, rows=(), tail="", **files):
    """A folder as a run leaves it; `files` are what is in NAME.json."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + tail)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def log(folder, attempt, rank, *lines):
    place = folder / f"logs/attempt-{attempt}/rank-{rank}.log"
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("a") as file:
        file.writelines(
            f"2026-01-01 00:{attempt:02d}:{at:02d} {line}\n" for at, line in enumerate(lines)
        )


ROWS = [{"step": step, "train/loss": 1 / step, "eval/loss": 2 / step} for step in (1, 2, 3, 4)]


class Page(HTMLParser):
    """The elements and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.rows = [], [], [], []
        self._in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.texts.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data


def page_of(*folders, **options):
    runs = read_runs([str(folder) for folder in folders])
    text = render(runs, log=options.get("log", False), made="now")
    return runs, text, Page(text)


HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'<\\script>"


def make_hostile(folder):
    closing = "</script><script>document.title='owned'</script>"
    return make_run(
        folder / HOSTILE.replace("/", "_"),
        [{"step": 1, "train/loss": 1.0, f"eval/{closing}": 2.0}, {"step": 2, "train/loss": 0.5}],
        config={closing: closing, "checkpoint": {"best_metric": closing}},
        env={"devices": {"count": closing, "kind": closing, "processes": 1}, "x": "\ud800"},
        failure={"error": closing, "rank": closing, "log": closing, "step": 2},
    )
