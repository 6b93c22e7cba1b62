"""The 1,797 handwritten digits, 8x8 pixels, inside scikit-learn (UCI optdigits)."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.errors import UserError


def load(held_out: int = 360, split_seed: int = 0) -> dict[str, Any]:
    """Images `x` float32 (examples, 8, 8, 1) in [0, 1] and labels `y` int32 (examples,).

    It reads the file inside the package without importing scikit-learn, which takes a second.

    Args:
        held_out: how many examples, drawn at random, to keep for evaluation.
        split_seed: the seed of that draw.

    Raises:
        UserError: scikit-learn is not installed.
    """
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise UserError(
            "the digits come with scikit-learn, which is not installed",
            'pip install "podlift[data]"',
        )
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not path.exists():
        raise UserError(f"this scikit-learn has no {path}", 'pip install "scikit-learn>=1.3"')
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    x = (table[:, :-1] / 16.0).reshape(-1, 8, 8, 1)
    y = table[:, -1].astype(np.int32)
    order = np.random.default_rng(split_seed).permutation(len(x))
    train, held = order[held_out:], order[:held_out]
    return {"train": {"x": x[train], "y": y[train]}, "eval": {"x": x[held], "y": y[held]}}
