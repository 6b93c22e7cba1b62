"""The style of the page, and the script that shows values under the pointer.

Colours have a contrast of at least 3:1 with the background (WCAG 2.2 on graphics) and differ in
lightness as well as in hue, for readers who do not see hues.
"""

from __future__ import annotations

LIGHT = ("#0b6cb8", "#c4500a", "#00795a", "#a83c84", "#7a6200", "#3d4756")
DARK = ("#62b6f0", "#f59a58", "#43cfa0", "#ec9bd0", "#e3c04a", "#c3ccd8")
LIGHT_CARD, DARK_CARD = "#ffffff", "#1b1f27"


def _palette(colours: tuple[str, ...], card: str) -> str:
    numbered = "".join(f" --c{number}: {colour};" for number, colour in enumerate(colours))
    return f"--card: {card};{numbered}"


STYLE = (
    ":root { color-scheme: light dark; --page: #f5f6f8; --text: #1b222c; --quiet: #5a6472; "
    "--rule: #dde1e7; --grid: #e9ecf0; --good: #0a6b4c; --bad: #b3261e; --busy: #0b6cb8; "
    f"--held: #7a5a00; {_palette(LIGHT, LIGHT_CARD)} }}\n"
    "@media (prefers-color-scheme: dark) { :root { --page: #12151b; --text: #e5e9f0; "
    "--quiet: #9aa5b5; --rule: #323946; --grid: #282e39; --good: #5fd3a6; --bad: #ff8f86; "
    f"--busy: #62b6f0; --held: #e3c04a; {_palette(DARK, DARK_CARD)} }} }}\n"
    + "".join(
        f".line.c{n}, .swatch .c{n} {{ stroke: var(--c{n}); }} .dot.c{n} {{ fill: var(--c{n}); }}\n"
        for n in range(len(LIGHT))
    )
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.25rem 1.5rem 4rem; max-width: 77rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; letter-spacing: -0.015em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 0.8rem; letter-spacing: -0.005em; }
h3 { font-size: 0.95rem; margin: 0 0 0.6rem; }
h1, h2, h3, th, td, dd, li, p { overflow-wrap: break-word; }
p { margin: 0.4rem 0; }
.quiet { color: var(--quiet); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 1rem 1.15rem; margin: 0 0 1rem; }
.facts { display: grid; gap: 1rem 1.5rem; margin: 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.facts div { min-width: 0; }
dt { color: var(--quiet); font-size: 0.8rem; }
dd { margin: 0; font-size: 1.05rem; font-weight: 600; font-variant-numeric: tabular-nums; }
dd small { display: block; color: var(--quiet); font-weight: 400; font-size: 0.8rem; }
.state { font-weight: 600; }
.finished { color: var(--good); } .failed { color: var(--bad); }
.running { color: var(--busy); } .stopped { color: var(--held); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: left; vertical-align: baseline; padding: 0.36rem 1.4rem 0.36rem 0;
  border-bottom: 1px solid var(--rule); font-weight: 400; }
thead th { color: var(--quiet); font-size: 0.8rem; vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.number { text-align: right; white-space: nowrap; }
.stamp { white-space: nowrap; }
tbody th, td.value { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  font-size: 0.84rem; }
td.value, td.ended { overflow-wrap: anywhere; min-width: 8rem; }
.named { white-space: nowrap; }
.named .swatch { margin-right: 0.5rem; vertical-align: middle; }
details { margin-top: 0.7rem; }
summary { cursor: pointer; color: var(--quiet); }
details[open] > summary { margin-bottom: 0.5rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.6rem 0; font: 0.84rem/1.5
  ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.chart { position: relative; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; padding: 0.8rem 0.9rem 0.7rem; margin: 0; min-width: 0; }
.chart h3 { margin: 0 0 0.3rem; }
.chart h3 span { color: var(--quiet); font-weight: 400; font-size: 0.8rem; }
.plot { display: block; width: 100%; height: auto; }
.plot text { fill: var(--quiet); font-size: 11px; font-variant-numeric: tabular-nums; }
.plot .x { text-anchor: middle; } .plot .y { text-anchor: end; }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
.grid { stroke: var(--grid); } .axis, .tick, .cursor { stroke: var(--quiet); fill: none; }
.axis, .tick { opacity: 0.6; }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; list-style: none; padding: 0;
  margin: 0.35rem 0 0 0.2rem; color: var(--quiet); font-size: 0.8rem; }
.legend .swatch { margin-right: 0.4rem; vertical-align: middle; }
.tip { position: absolute; top: 2.4rem; pointer-events: none; background: var(--card);
  border: 1px solid var(--rule); border-radius: 6px; padding: 0.3rem 0.6rem; font-size: 0.8rem;
  box-shadow: 0 2px 8px #0002; font-variant-numeric: tabular-nums; max-width: 70%; }
.tip div { display: flex; justify-content: space-between; gap: 1rem; }
ul.notes { margin: 0.3rem 0; padding-left: 1.1rem; }
@media print { body { background: none; } .card, .chart { break-inside: avoid; } }
"""
)

# Shows the values under the pointer. Names come from the legend through `textContent`, so nothing
# that a run wrote is parsed as HTML.
SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("points").textContent);
const [left, right, width] = data.box;
document.querySelectorAll(".chart").forEach((figure, at) => {
  const { last, lines } = data.charts[at];
  const plot = figure.querySelector(".plot"), cursor = figure.querySelector(".cursor");
  const names = [...figure.querySelectorAll(".legend li")].map((item) => item.textContent);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const row = (name, value) => {
    const line = document.createElement("div");
    for (const text of [name, value]) {
      line.append(Object.assign(document.createElement("span"), { textContent: text }));
    }
    return line;
  };
  const nearest = ([steps, values], step) => {
    let best = -1;
    steps.forEach((there, i) => {
      if (values[i] === null) return;
      if (best < 0 || Math.abs(there - step) < Math.abs(steps[best] - step)) best = i;
    });
    return best;
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = (event.clientX - box.left) * width / box.width;
    const step = (x - left) / (right - left) * last;
    const found = lines.map((line) => nearest(line, step));
    const there = lines.map((line, i) => line[0][found[i]]).filter((s) => s !== undefined);
    if (!there.length) return;
    const near = there.reduce((a, b) => Math.abs(a - step) <= Math.abs(b - step) ? a : b);
    const reach = last / 60;
    tip.replaceChildren(row("step", near.toLocaleString("en")));
    lines.forEach((line, i) => {
      if (found[i] < 0 || Math.abs(line[0][found[i]] - near) > reach) return;
      tip.append(row(names[i], String(line[1][found[i]])));
    });
    const place = left + near / last * (right - left);
    cursor.setAttribute("transform", `translate(${place} 0)`);
    cursor.setAttribute("visibility", "visible");
    tip.hidden = false;
    const isRight = place > width / 2;
    tip.style.left = isRight ? "auto" : `${place / width * 100 + 4}%`;
    tip.style.right = isRight ? `${(1 - place / width) * 100 + 4}%` : "auto";
  });
  plot.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  });
});
"""
