"""`examples.py MODEL FOLDER`: writes the examples, and the initial weights from podlift."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from podlift_config import BATCHES, get_config

from trainer.config.settings import check
from trainer.state.leaves import name_leaves
from trainer.step.job import build_job, make_init

BATCHES_AN_EPOCH = 64


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    random = np.random.default_rng(0)
    count = BATCHES_AN_EPOCH * BATCHES[name]
    shape = (8, 8, 1) if name == "resnet" else (64,)
    x = random.normal(size=(count, *shape)).astype(np.float32)
    # Learnable labels, so that equally falling losses are evidence.
    y = (x.reshape(count, -1) @ random.normal(size=(64, 10))).argmax(axis=1).astype(np.int32)
    path = folder / f"{name}.npz"
    np.savez(path, x=x, y=y)
    config = get_config(name)
    config.data.path = str(path)
    settings = check(config)
    state = make_init(build_job(settings), settings.seed)()
    params = {leaf: np.asarray(value) for leaf, value in name_leaves(state.params).items()}
    np.savez(folder / f"{name}-weights.npz", **params)


if __name__ == "__main__":
    main()
