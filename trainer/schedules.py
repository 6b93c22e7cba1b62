"""Learning rates that span the run: `num_steps` is filled in by the trainer."""

from __future__ import annotations

import optax


def warmup_cosine(
    peak_value: float, num_steps: int, warmup_fraction: float = 0.1, end_value: float = 0.0
) -> optax.Schedule:
    """Linear warm-up from 0 to `peak_value`, then a cosine to `end_value` at `num_steps`."""
    warmup_steps = max(1, round(warmup_fraction * num_steps))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak_value,
        warmup_steps=warmup_steps,
        decay_steps=max(num_steps, warmup_steps + 1),
        end_value=end_value,
    )


def onecycle(peak_value: float, num_steps: int) -> optax.Schedule:
    """The cosine one-cycle policy of Smith and Topin (arXiv:1708.07120) over the run."""
    return optax.cosine_onecycle_schedule(max(num_steps, 4), peak_value)
