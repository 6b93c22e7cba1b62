import numpy as np


def load(seed: int, num_examples: int = 2000, noise: float = 0.05):
    """podlift passes the run's `seed`, because this function has a parameter of that name."""
    random = np.random.default_rng(seed)
    label = random.integers(2, size=num_examples) * 2 - 1
    angle = 3 * np.pi * np.sqrt(random.uniform(size=num_examples))
    turned = angle + np.where(label > 0, 0.0, np.pi)
    x = np.stack([np.cos(turned), np.sin(turned)], axis=1) * (angle / 10)[:, None]
    x = (x + noise * random.normal(size=x.shape)).astype(np.float32)
    y = label.astype(np.float32)
    held_out = num_examples // 5
    return {
        "train": {"x": x[held_out:], "y": y[held_out:]},
        "eval": {"x": x[:held_out], "y": y[:held_out]},
    }
