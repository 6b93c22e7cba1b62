"""Parts of the params that stay as they are, by path.

A step takes the gradient of the others only (`Task.trainable`): what only the gradient of frozen
leaves needs is not computed, and they are not in the mean over the axis, in `train/grad_norm` or in
`clip_norm`. The optimizer does not see them, so it decays none and keeps no memory of any.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer.errors import UserError
from trainer.state.leaves import fill_in, name_leaves
from trainer.state.subtrees import hint_for, is_within


def without_frozen(tree: Any, frozen: tuple[str, ...]) -> Any:
    """Params, or what is shaped like them, without frozen leaves.

    In place of each is `optax.MaskedNode()`, which has no leaves: optimizers know it.

    Args:
        tree: nested as the params are; frozen leaves may be left out already.
        frozen: parts of it, by path.
    """
    if not frozen:
        return tree

    def keep(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return optax.MaskedNode() if any(is_within(name, part) for part in frozen) else leaf

    return jax.tree_util.tree_map_with_path(keep, tree)


def freeze(
    optimizer: optax.GradientTransformation, frozen: tuple[str, ...]
) -> optax.GradientTransformation:
    """An optimizer for the params that are not frozen; the updates of the others change nothing.

    Unlike `optax.masked` it keeps the structure of the optimizer's state, so that leaves of parts
    that are trained have the same names whatever else is frozen.

    Args:
        optimizer: for all params.
        frozen: parts of them, by path.

    Raises:
        UserError: at `init`, if there is no such part, or nothing would be trained.
    """
    if not frozen:
        return optimizer
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Any:
        _check(list(name_leaves(params)), frozen)
        return optimizer.init(without_frozen(params, frozen))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        assert params is not None
        changes, state = optimizer.update(
            without_frozen(updates, frozen), state, without_frozen(params, frozen), **extra
        )
        # Not 0.0: adding that turns a -0.0 into 0.0.
        still = jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), params)
        return fill_in(still, changes), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check(names: list[str], frozen: tuple[str, ...]) -> None:
    for part in frozen:
        if not any(is_within(name, part) for name in names):
            raise UserError(
                f"config.freeze names {part!r}, which is no part of the params",
                hint_for(part, names),
            )
    if all(any(is_within(name, part) for part in frozen) for name in names):
        raise UserError("config.freeze leaves nothing to train", "freeze fewer parts")
