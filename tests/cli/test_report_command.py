"""`python -m launcher report`, from the command line to the page in a real browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, skip_here
from report_pages import ROWS, Page, make_hostile, make_run

from launcher.cli.report import main
from launcher.report import assets, scale


def test_the_page_can_be_written_whatever_is_in_it(tmp_path, capsys):
    make_hostile(tmp_path)
    (folder,) = tmp_path.iterdir()
    assert main([str(folder), f"--out={tmp_path}/r.html"]) == 0
    assert "\\ud800" in (tmp_path / "r.html").read_text()
    assert "failed at step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_a_mistake_is_reported_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/mine", ROWS)
    make_run(tmp_path / "runs/other", ROWS)
    (tmp_path / "runs/empty").mkdir()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) <= 2
    assert not list(tmp_path.glob("**/*.html"))


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
