"""Writes docs/config.md from the keys themselves: python docs/make_config_md.py."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from trainer.config.keys import KEYS, RESUMABLE

HEAD = """\
# Config keys

A config file has a function `get_config(arg=None)` that returns an `ml_collections.ConfigDict`. A
config holds only data: it names code by import path, `target="package.module:attribute"`, and the
rest of the block becomes keyword arguments. Missing keys take the defaults below. You can
override every key on the command line: `--config.optimizer.learning_rate=0.1`. An argument of a
target can be overridden only if the file names it. `--config.KEY=None` sets None where a key
allows it: keys whose default is None, `checkpoint.every_steps`, and entries of a block that names
code (`--config.data.augment=None`).

`python -m launcher --config=FILE --print_config` prints the result without running it.

## Blocks that name code

| block | the target is | called with |
|---|---|---|
| `model` | a Linen or [NNX](nnx.md) module | the rest of it; then `model(batch["x"], train=...)` |
| `loss` | `(outputs, batch) -> (examples,)` | the rest of the block as keyword arguments |
| `metrics.NAME` | the same, reported as `train/NAME` and `eval/NAME` | the same |
| `data` | returns `{"train": source, "eval": source}` | the rest, and `seed` if it accepts it |
| `data.augment` | `(batch, random) -> batch` on host arrays | the rest of its block |
| `optimizer` | an optax transformation | the rest, and `num_steps` if it accepts it |
| `optimizer.learning_rate` | a number, or a block that builds a schedule | as for `optimizer` |

A source is a dict of arrays with a leading example axis, one of them `x`, or any object with
`len(source)` and `source[indices]` (a numpy integer array) that returns such a dict.

## Keys

| key | default | meaning |
|---|---|---|
"""


def render() -> str:
    """The whole page."""
    rows = [
        f"| `{key}` | {'None' if isinstance(default, type) else f'`{default!r}`'} | {meaning} |\n"
        for key, (default, meaning) in KEYS.items()
    ]
    golden = (ROOT / "tests" / "golden" / "digits-resnet.txt").read_text()
    resumable = ", ".join(f"`{key}*`" if key.endswith(".") else f"`{key}`" for key in RESUMABLE)
    return "".join(
        [
            HEAD,
            *rows,
            "\n## On a resume\n\n",
            f"These may differ from the first run in the same workdir: {resumable}. Any other\n",
            "difference is shown and refused. A schedule that spans the run is stretched when\n",
            "its length changes, so the learning rate may jump; the run says so.\n",
            "\n## A resolved config\n\n",
            "`python -m launcher --config=configs/digits.py:resnet --print_config` prints\n\n",
            f"```\n{golden}```\n",
        ]
    )


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(render())
