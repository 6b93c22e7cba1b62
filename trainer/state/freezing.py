"""Freezing subtrees of the params, named by path.

A step differentiates only with respect to the other params (`Task.trainable`). Gradients of frozen
leaves are not computed, and do not enter the mean over the axis, `train/grad_norm` or `clip_norm`.
The optimizer does not see frozen leaves either: it applies no weight decay to them and keeps no
state for them.
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
    """Replaces each frozen leaf with `optax.MaskedNode()`, a node without leaves.

    Args:
        tree: the params, or a tree of the same structure; frozen leaves may be masked already.
        frozen: paths of subtrees.
    """
    if not frozen:
        return tree

    def keep(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return optax.MaskedNode() if any(is_within(name, subtree) for subtree in frozen) else leaf

    return jax.tree_util.tree_map_with_path(keep, tree)


def freeze(
    optimizer: optax.GradientTransformation, frozen: tuple[str, ...]
) -> optax.GradientTransformation:
    """Restricts an optimizer to the params that are not frozen; the others receive no update.

    Unlike `optax.masked` it keeps the structure of the optimizer's state, so the names of its
    leaves do not depend on what is frozen.

    Args:
        optimizer: for all params.
        frozen: paths of subtrees of the params.

    Raises:
        UserError: at `init`, if a path matches nothing, or nothing is left to train.
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
        # -0.0, because adding 0.0 would turn a param of -0.0 into 0.0.
        unchanged = jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), params)
        return fill_in(unchanged, changes), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check(names: list[str], frozen: tuple[str, ...]) -> None:
    for subtree in frozen:
        if not any(is_within(name, subtree) for name in names):
            raise UserError(
                f"config.freeze: {subtree!r} matches no part of the params",
                hint_for(subtree, names),
            )
    if all(any(is_within(name, subtree) for subtree in frozen) for name in names):
        raise UserError("config.freeze leaves nothing to train", "freeze fewer parts")
