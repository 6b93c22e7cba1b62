"""The page of a report: what it reads from the folders of runs, and what it shows."""

from __future__ import annotations

import math
import re

import pytest
from report_pages import ROWS, Page, log, make_hostile, make_run, page_of

from launcher.report.read import distinct_names, read_runs
from trainer.errors import UserError


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


def test_control_characters_are_shown(tmp_path):
    odd = "\x1b[2J\u202etext"
    rows = [{"step": 1, odd: 1.0}, {"step": 2, odd: 2.0}]
    failure = {"error": odd, "rank": 0, "log": odd, "step": 2}
    run = make_run(
        tmp_path / "run\x1b[2J", rows, config={odd: odd}, env={odd: odd}, failure=failure
    )
    log(run, 1, 0, f"warning: {odd}", f"error: {odd}")
    _, text, _ = page_of(run)
    assert text.count("\\x1b[2J\\u202etext") > 4
    assert "\x1b" not in text
    assert "\u202e" not in text


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


def test_charts_describe_themselves_and_curves_differ_by_dash(tmp_path):
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
def test_names_of_runs_are_unique(paths, names):
    assert distinct_names(paths) == names


def test_a_file_that_may_not_be_read_is_one_line(tmp_path):
    folder = make_run(tmp_path / "run", ROWS)
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_runs([str(folder)])
