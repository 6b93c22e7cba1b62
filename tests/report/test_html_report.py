"""`python -m launcher report`: what it reads, what it draws, and the page in a real browser."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT, skip_here
from hypothesis import given
from hypothesis import strategies as st

from launcher.cli.report import main
from launcher.report import assets, chart, scale
from launcher.report.page import render
from launcher.report.read import distinct_names, read_runs
from launcher.report.thin import thin
from trainer.errors import UserError

finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


# Fewer points, axes, numbers


@given(
    st.lists(st.one_of(st.none(), finite), min_size=1, max_size=400),
    st.integers(1, 20),
    st.integers(1, 1000),
)
def test_thinning_keeps_extremes_ends_and_gaps(values, buckets, every):
    points = [(every * index, value) for index, value in enumerate(values)]
    kept = thin(points, buckets)
    assert len(kept) <= 5 * buckets
    steps = [step for step, _ in kept]
    assert steps == sorted(set(steps))
    assert set(kept) <= set(points)
    numbers, left = ([v for _, v in group if v is not None] for group in (points, kept))
    assert (None in values) == (None in (v for _, v in kept))
    if numbers:
        assert (min(numbers), max(numbers)) == (min(left), max(left))
        assert (numbers[0], numbers[-1]) == (left[0], left[-1])


def test_one_spike_among_many_points_is_drawn():
    points = [(step, 9.0 if step == 54_321 else 1.0) for step in range(100_000)]
    assert (54_321, 9.0) in thin(points)
    picture, hover = chart.draw("train/loss", [chart.Line("a", 0, points)], 99_999, log=False)
    assert len(picture) < 60_000
    assert max(hover["lines"][0][1]) == 9.0


@given(st.lists(finite, min_size=1, max_size=5), st.booleans())
def test_ticks_lie_on_the_axis_and_are_told_apart(values, log):
    axis = scale.values_scale(values, log=log)
    drawable = [value for value in values if abs(value) <= scale.LARGEST]
    assert math.isfinite(axis.low)
    assert axis.low < axis.high < math.inf
    assert 1 <= len(axis.ticks) <= 12
    for value, _ in axis.ticks:
        assert -1e-9 <= axis.place(value) <= 1 + 1e-9
    labels = [label for _, label in axis.ticks]
    assert len(set(labels)) == len(labels)
    for value in drawable:
        if not axis.is_log:
            assert -1e-9 <= axis.place(value) <= 1 + 1e-9


@pytest.mark.parametrize(
    ("values", "log", "labels"),
    [
        ([0.0, 1.0], False, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.96, 0.99], False, ["0.96", "0.97", "0.98", "0.99"]),
        ([3.0, 3.0], False, ["2.7", "2.8", "2.9", "3.0", "3.1", "3.2"]),
        ([0.0, 23_000.0], False, ["0", "5k", "10k", "15k", "20k"]),
        ([1e-5, 3e-5], False, ["1.0e-5", "1.5e-5", "2.0e-5", "2.5e-5", "3.0e-5"]),
        ([], False, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([1e-3, 10.0], True, ["0.001", "0.01", "0.1", "1", "10"]),
        ([0.3, 4.0], True, ["0.5", "1", "2"]),
        ([-1.0, 0.0], True, ["-1.0", "-0.8", "-0.6", "-0.4", "-0.2", "0.0"]),
    ],
)
def test_labels(values, log, labels):
    found = [label for _, label in scale.values_scale(values, log=log).ticks]
    assert found == labels


def test_numbers_and_steps():
    told = {
        0.0: "0",
        1.0: "1",
        0.99167: "0.9917",
        19751.8: "19,752",
        2.9e-5: "2.9e-5",
        1e30: "1e30",
    }
    assert {value: scale.number(value) for value in told} == told
    assert [label for _, label in scale.steps_scale(5).ticks] == ["0", "1", "2", "3", "4", "5"]
    assert [label for _, label in scale.steps_scale(0).ticks] == ["0", "1"]


@pytest.mark.parametrize(
    ("colours", "card"), [(assets.LIGHT, assets.LIGHT_CARD), (assets.DARK, assets.DARK_CARD)]
)
def test_lines_stand_out_and_differ_without_colour(colours, card):
    def luminance(colour):  # WCAG 2.2
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert len(colours) == chart.COLOURS
    assert all(contrast(colour, card) >= 3 for colour in colours)
    assert len({chart.swatch(number) for number in range(42)}) == 42


# Folders of runs


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


def test_a_run_that_is_being_written(tmp_path):
    run = make_run(tmp_path / "run", ROWS, tail='{"step": 5, "train/loss": 0.1')
    (only,), text, page = page_of(run)
    assert only.steps == 4
    assert only.best.value == 0.5
    assert only.best.step == 4
    assert only.status == "stopped at step 4"
    assert only.missing == ["config.json", "env.json"]
    assert "No logs." in text
    assert ["train/loss", "0.25", "0.25", "4", "1", "1"] in page.rows


def test_values_that_are_not_finite_are_gaps(tmp_path):
    rows = [{"step": step, "train/loss": float(step)} for step in range(1, 8)]
    rows[2]["train/loss"] = None
    rows[4]["train/loss"] = math.nan  # json writes NaN, as other programs may
    lines = '{"step": 8, "train/loss": Infinity}\n{"step": 9, "train/loss": 1e999}\n'
    odd = '[1]\n{"step": "x"}\n{"step": 9, "a": "text", "b": true, "c": [1]}\n{"step": NaN}\n'
    (run,), text, _ = page_of(make_run(tmp_path / "run", rows, tail=lines + odd + "\0\xff\n"))
    values = [value for _, value in run.series["train/loss"]]
    assert values == [1.0, 2.0, None, 4.0, None, 6.0, 7.0, None, None]
    assert list(run.series) == ["train/loss"]
    path = re.search(r'class="line c0" d="([^"]*)"/><circle', text)[1]
    assert path.count("M") == 2  # 1-2 and 6-7; 4 is a dot
    assert text.count("<circle") == 5
    assert "not finite" in text
    assert "NaN" not in text


@pytest.mark.parametrize("missing", ["config", "env", "metrics", "failure"])
def test_any_file_may_be_missing_or_damaged(tmp_path, missing):
    for damage in (None, "", "{", "[]", "\0"):
        folder = make_run(
            tmp_path / f"{missing}{damage!r}",
            ROWS,
            config={"seed": 3},
            env={"packages": {"jax": "0.10.2"}, "devices": "odd"},
            failure={"error": "boom"},
        )
        path = folder / ("metrics.jsonl" if missing == "metrics" else f"{missing}.json")
        if damage is None:
            path.unlink()
        else:
            path.write_text(damage)
        _, text, _ = page_of(folder)
        assert ("0.10.2" in text) == (missing != "env")
        assert ("boom" in text) == (missing != "failure")


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


def test_what_a_run_has_written_is_text(tmp_path):
    hostile = make_hostile(tmp_path)
    log(hostile, 1, 0, "warning: <b>bold</b>", "error: <b>bold</b>")
    aside = hostile / "checkpoints/quarantine/<b>"
    aside.mkdir(parents=True)
    (aside / "why.txt").write_text("<b>why</b>")
    plain = make_run(tmp_path / "plain", ROWS)
    for folders in ([hostile], [hostile, plain]):
        _, text, page = page_of(*folders)
        assert page.tags.count("script") == 2
        assert not {"b", "img", "a", "link", "iframe", "object", "image", "use"} & set(page.tags)
        names = {name for name, _ in page.attributes}
        assert not [name for name in names if name.startswith("on")]
        assert not {"src", "href", "xlink:href", "srcset", "action", "background"} & names
        assert "://" not in text
        assert "url(" not in text
        assert "@import" not in text
        assert any("bold" in part for part in page.texts)


def test_the_page_can_be_written_whatever_is_in_it(tmp_path, capsys):
    make_hostile(tmp_path)
    (folder,) = tmp_path.iterdir()
    assert main([str(folder), f"--out={tmp_path}/r.html"]) == 0
    assert "\\ud800" in (tmp_path / "r.html").read_text()
    assert "failed at step 2" in capsys.readouterr().out


def test_keys_that_differ_come_first(tmp_path):
    config = {"seed": 0, "model": {"size": 8, "target": "a:b"}, "__none_types__": {}}
    a = make_run(tmp_path / "x/run", ROWS, config=config)
    b = make_run(
        tmp_path / "y/run",
        [*ROWS, {"step": 9, "train/mine": 1.0}],
        config={**config, "model": {"size": 16}},
    )
    (first, second), text, page = page_of(a, b, a)
    assert (first.name, second.name) == ("x/run", "y/run")
    shown, every = text.split("<h2>Config</h2>")[1].split("<h2>Environment")[0].split("<details>")
    assert [row[0] for row in Page(shown).rows] == ["key", "model.size", "model.target"]
    assert ["model.target", '"a:b"', "\N{EN DASH}"] in page.rows
    assert "all 3 keys" in every
    assert "seed" in every
    assert "__none_types__" not in text
    assert text.count("<figure") == 3
    assert ["train/mine", "\N{EN DASH}", "1"] in page.rows


def test_curves_tell_what_they_show_and_differ_by_dash(tmp_path):
    runs = [make_run(tmp_path / name, ROWS) for name in "ab"]
    _, text, page = page_of(*runs, log=True)
    assert "train/loss by step, logarithmic. a: 1 at step 1, 0.25 at step 4" in text
    assert "between 0.25 and 1" in text
    assert page.tags.count("title") == 1 + 2  # of the page, and of each chart
    assert page.tags.count("desc") == 2
    figure = text.split("<figure")[1].split("</figure>")[0]
    assert 'class="line c0" d=' in figure
    assert 'class="line c1" stroke-dasharray="7 3"' in figure
    assert figure.count("<li>") == 2


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/runs/a"], ["a"]),
        (["/runs/a/", "/runs/b"], ["a", "b"]),
        (["/x/run", "/y/run"], ["x/run", "y/run"]),
        (["gs://one/run", "gs://two/run"], ["one/run", "two/run"]),
        (["/run", "/x/run"], ["run", "x/run"]),
    ],
)
def test_names_tell_runs_apart(paths, names):
    assert distinct_names(paths) == names


def attempts_of(folder):
    (run,), text, page = page_of(folder)
    return run, text, [attempt.ending for attempt in run.attempts], page


def test_attempts_as_their_logs_tell_them(tmp_path):
    folder = make_run(tmp_path / "run", ROWS, config={"num_steps": 40})
    # 1: rank 1 is killed; what rank 0 says is a consequence.
    log(folder, 1, 0, "step 10/40  loss 1", "error: X on rank 0: Gloo all-reduce failed: reset")
    log(folder, 1, 1, "step 10/40  loss 1")
    # 2: rank 1 raises and rank 0 is ended.
    log(folder, 2, 0, "restored step 10 from /x", "warning: slow", "warning: slow", "step 15/40  l")
    log(folder, 2, 1, "step 15/40  loss 1", "error: ValueError on rank 1: mine", "  more")
    # 3: asked to stop.
    log(folder, 3, 0, "restored step 15 from /x", "step 20/40  loss 1")
    log(folder, 3, 0, "", "", "asked to stop: saving at step 22")
    # 10: without a word.
    log(folder, 10, 0, "restored step 22 from /x", "step 30/40  loss 1")
    run, text, endings, page = attempts_of(folder)
    assert endings == [
        "rank 1 ended without an error message at step 10; then X on rank 0: Gloo all-reduce "
        "failed: reset",
        "ValueError on rank 1: mine",
        "asked to stop: saving at step 22",
        "",
    ]
    assert [a.number for a in run.attempts] == [1, 2, 3, 10]
    assert [(a.first_step, a.last_step) for a in run.attempts] == [
        (0, 10),
        (10, 15),
        (15, 22),
        (22, 30),
    ]
    assert [a.went_well for a in run.attempts] == [False, False, True, False]
    assert run.status == "stopped at step 30 of 40, without an error message"
    assert run.seconds == 1 + 3 + 2 + 1
    assert "attempt 2: slow (2 times)" in text
    row = ["2", "2026-01-01 00:02:00", "0:00:03", "2", "10", "15", "ValueError on rank 1: mine"]
    assert row in page.rows


def test_a_failure_is_told_until_a_later_attempt(tmp_path):
    failure = {"error": "killed by SIGKILL\n  HINT: x", "step": 7, "attempt": 1, "rank": 3}
    failure["log"] = str(tmp_path / "run/logs/attempt-2/rank-3.log")
    folder = make_run(tmp_path / "run", ROWS, failure=failure)
    log(folder, 1, 0, "step 3/40  loss 1")
    log(folder, 2, 0, "restored step 3 from /x", "step 7/40  loss 1")
    run, text, endings, _ = attempts_of(folder)
    assert (run.state, run.status) == ("failed", "failed at step 7 of 40")
    assert endings == ["", failure["error"]]
    assert "HINT: x" in text
    log(folder, 3, 0, "restored step 7 from /x", "finished: 40 steps in 0:01:05")
    log(folder, 3, 0, *[""] * 9, "step 40/40  loss 1")
    run, _, _, _ = attempts_of(folder)
    assert run.state == "finished"
    assert run.attempts[-1].seconds == 65


def test_quarantine_and_skipped_updates(tmp_path):
    rows = [*ROWS, {"step": 5, "train/skipped": 2}]
    folder = make_run(tmp_path / "run", rows)
    for kind in ("checkpoints", "best"):
        (folder / kind / "quarantine/4-20260101T000000").mkdir(parents=True)
    (folder / "checkpoints/quarantine/4-20260101T000000/why.txt").write_text("state/x is missing\n")
    _, text, _ = page_of(folder)
    assert "checkpoints/quarantine/4-20260101T000000: state/x is missing" in text
    assert "best/quarantine/4-20260101T000000: reason unknown" in text
    assert "2 updates were not finite and were skipped" in text


HOLD = """
import sys, time
from etils import epath
from trainer.workdir import lock
lock.acquire(epath.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_that_is_going_on(tmp_path):
    folder = make_run(tmp_path / "run", ROWS, failure={"error": "before", "attempt": 1})
    log(folder, 1, 0, "step 4/40  loss 1")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        (run,), text, _ = page_of(folder)
    finally:
        holder.kill()
        holder.communicate()
    assert run.status == "running, at step 4 of 40"
    assert ">running</td>" in text


# The command


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "a workdir is missing"),
        ([""], "a workdir is missing"),
        (["runs/mine", "--ouput=x.html"], "did you mean --out"),
        (["runs/mine", "--config=x.py"], "there is no flag --config"),
        (["runs/mine", "--out=nowhere/x.html"], "there is no folder"),
        (["runs/mine", "--out=runs"], "--out=runs is not a file"),
        (["runs/mine", "--out=/proc/x.html"], "cannot be written"),
        (["runs/mien"], "there is no folder runs/mien\n  HINT: did you mean runs/mine?"),
        (["runs/mine/metrics.jsonl"], "is a file, not the folder of a run\n  HINT: did you mean"),
        (
            ["runs"],
            "runs is not the folder of a run: it has none of config.json, env.json, metrics.jsonl",
        ),
        (["runs"], "HINT: runs in it: runs/mine, runs/other"),
        (["runs/empty"], "HINT: runs near it: runs/mine, runs/other"),
        (["nowhere/at/all"], "HINT: name the --workdir of a run"),
        (["runs/mine", "--log=perhaps"], "perhaps"),
    ],
)
def test_what_a_person_got_wrong(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/mine", ROWS)
    make_run(tmp_path / "runs/other", ROWS)
    (tmp_path / "runs/empty").mkdir()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert len(err.splitlines()) <= 2
    assert not list(tmp_path.glob("**/*.html"))


def test_a_file_that_may_not_be_read_is_one_line(tmp_path):
    folder = make_run(tmp_path / "run", ROWS)
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_runs([str(folder)])


def run_report(start, *arguments):
    process = start(
        "launcher",
        "report",
        *arguments,
        module="conftest_imports",
        environ={"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )
    out, err = process.communicate(timeout=60)
    assert "imported jax" not in err
    return process.returncode, out, err


def test_help(start):
    code, out, err = run_report(start, "--help")
    assert (code, err) == (0, "")
    assert "--out=FILE.html" in out


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory, cache_dir):
    """Runs of configs/mlp.py as they are: one in two parts, one whose loss is not a number."""
    folder = tmp_path_factory.mktemp("runs")
    environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_dir)
    for name, code, *more in (
        ("good", 0, "--config.num_steps=60", "--config.stop_at_step=20"),
        ("good", 0, "--config.num_steps=60"),
        ("bad", 1, "--config.num_steps=60", "--config.optimizer.learning_rate=1e30"),
    ):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "launcher", "--config=configs/mlp.py", "--fake_devices=2"),
                *(f"--workdir={folder}/{name}", "--config.log_every_steps=2", *more),
            ],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
    return folder


@pytest.mark.wide
def test_real_runs(start, real_runs, tmp_path):
    code, out, err = run_report(
        start, real_runs / "good", "--out", tmp_path / "r.html", real_runs / "bad"
    )
    assert code == 0, err
    assert out.splitlines()[0] == "good: finished, 60 steps"
    assert out.splitlines()[1].startswith("bad: failed at step ")
    assert out.splitlines()[2] == f"wrote {tmp_path}/r.html"
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    last = json.loads((real_runs / "good/metrics.jsonl").read_text().splitlines()[-1])
    rows = {row[0]: row for row in page.rows if row}
    assert rows["train/loss"][1:] == [scale.number(last["train/loss"]), "not finite"]
    assert rows["optimizer.learning_rate"][2] == "1e+30"
    assert ["20", "60"] in [row[4:6] for row in page.rows]
    assert "stopped at step 20 of 60 (config.stop_at_step)" in text
    assert "finished: 60 steps in" in text
    assert "not finite at step" in text
    assert "--config.nan=skip" in html.unescape(text)
    assert "2 cpu" in text


DIES_AT_FIRST = """
import os, signal
import jax
from trainer.losses import squared_error
def loss(outputs, batch):
    if os.environ["PODLIFT_ATTEMPT"] == "1" and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return squared_error(outputs, batch)
"""


@pytest.mark.slow
def test_a_restart_as_its_logs_tell_it(launch, tmp_path):
    (tmp_path / "mine.py").write_text(DIES_AT_FIRST)
    code, _, err = launch(
        "--config=configs/mlp.py",
        "--processes=2",
        "--fake_devices=1",
        "--max_restarts=1",
        "--config.loss.target=mine:loss",
        f"--workdir={tmp_path}/run",
        environ={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    assert code == 0, err
    (run,), text, _ = page_of(tmp_path / "run")
    assert run.status == "finished"
    assert run.devices == "2 cpu in 2 processes"
    first, second = run.attempts
    assert (first.processes, first.went_well, first.last_step) == (2, False, None)
    # Rank 0 may have been ended before it could say that it lost rank 1.
    assert not first.ending or first.ending.startswith("rank 1 ended without an error message")
    assert second.ending.startswith("finished: 5 steps in")
    assert "without an error message" in text


# The page in a browser


CHROMIUM = shutil.which("chromium")
needs_chromium = skip_here("" if CHROMIUM else "chromium is not installed")


def browse(profile, page, *how):
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            *how,
            page.as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    return done.stdout.decode()


@needs_chromium
def test_a_browser_shows_it_in_light_and_in_dark(real_runs, tmp_path):
    from PIL import Image

    page = tmp_path / "r.html"
    assert main([str(real_runs / "good"), str(real_runs / "bad"), f"--out={page}"]) == 0
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        browse(
            tmp_path / scheme,
            page,
            f"--screenshot={shot}",
            "--window-size=1200,2000",
            f"--blink-settings=preferredColorScheme={number}",
        )
        with Image.open(shot) as image:
            assert image.size == (1200, 2000)
            counts = image.convert("RGB").getcolors(maxcolors=1 << 24)
        assert len(counts) > 100
        common = {colour for count, colour in counts if count > 100}
        card = assets.LIGHT_CARD if scheme == "light" else assets.DARK_CARD
        line = (assets.LIGHT if scheme == "light" else assets.DARK)[0]
        for colour in (card, line):
            assert tuple(bytes.fromhex(colour[1:])) in common, (scheme, colour)


@needs_chromium
def test_a_hostile_run_is_only_shown(tmp_path):
    hostile = make_hostile(tmp_path / "runs")
    page = tmp_path / "r.html"
    assert main([str(hostile), f"--out={page}"]) == 0
    shown = browse(tmp_path / "profile", page, "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", shown)[1]
    assert html.unescape(title) == f"Report of {hostile.name}"
    assert shown.count('class="tip"') == 2  # our own script did run, and made one for each chart


POINT = """<script>
addEventListener("load", () => {
  const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
  const at = { clientX: box.left + box.width * 548 / 560, clientY: box.top + 50 };
  plot.dispatchEvent(new PointerEvent("pointermove", at));
});
</script></body>"""


@needs_chromium
def test_the_values_under_the_pointer(tmp_path):
    page = tmp_path / "r.html"
    runs = [make_run(tmp_path / name, ROWS) for name in ("one", "<two>")]
    assert main([*map(str, runs), f"--out={page}"]) == 0
    text = page.read_text()
    page.write_text(re.sub("<meta http-equiv[^>]*>", "", text).replace("</body>", POINT))
    shown = browse(tmp_path / "profile", page, "--dump-dom")
    tip = re.search(r'<div class="tip"[^>]*>(.*?)</div></div>', shown)[1]
    values = [html.unescape(part) for part in re.findall(r"<span>(.*?)</span>", tip)]
    assert values == ["step", "4", "one", "0.25", "<two>", "0.25"]
    # Our own page lets no such script run.
    page.write_text(text.replace("</body>", POINT))
    shown = browse(tmp_path / "profile", page, "--dump-dom")
    assert shown.count('<div class="tip" hidden=""></div>') == 2
