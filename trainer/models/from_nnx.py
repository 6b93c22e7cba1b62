"""NNX modules as Linen modules, whose variables are plain arrays with plain names.

`nnx.bridge.ToLinen` creates the module again in each call, keeps Flax's boxes in the state, and
does not distinguish training from evaluation. Here `nnx.split` describes the module once, and each
call merges that description with the variables (`nnx.merge`).

An `nnx.Param` becomes a parameter. Every other variable becomes state in the collection that Flax
names for its type, such as `batch_stats`. Random keys and their counts are not part of the state:
each call derives them from the key it receives, as Linen's dropout does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from trainer.errors import UserError

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Description:
    """The static part of an NNX module.

    Attributes:
        make: creates the module.
        graphs: its graph in evaluation mode and in training mode, in this order.
        leaves: all its variables by path, with shapes instead of values.
        takes_train: whether its call has a parameter `train`.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    graphs: tuple[Any, Any]
    leaves: dict[Path, Any]
    takes_train: bool


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module], where: str) -> nn.Module:
    """Wraps an NNX module in a Linen module.

    Args:
        make: creates the module; it is only traced here.
        where: the config key that names the module, for error messages.

    Raises:
        UserError: `make` creates something else, or a module whose state a step cannot keep.
    """

    def modes(module: nnx.Module) -> tuple[Any, Any]:
        module.eval()
        evaluation = nnx.split(module)[0]
        module.train()
        return evaluation, nnx.split(module)[0]

    module = nnx.eval_shape(lambda: _made(make, nnx.Rngs(0)))
    if not isinstance(module, nnx.Module):
        raise UserError(
            f"{where}: its target takes rngs but builds a {type(module).__name__}, not an NNX "
            "module"
        )
    leaves = _leaves(module)
    for path, leaf in leaves.items():
        if _collection(leaf) and jnp.issubdtype(_value(leaf).dtype, jax.dtypes.prng_key):
            raise UserError(
                f"{where}: {'/'.join(map(str, path))} contains random keys", "keep them in nnx.Rngs"
            )
    takes_train = "train" in inspect.signature(type(module).__call__).parameters
    return FromNNX(Description(make, modes(module), leaves, takes_train))


class FromNNX(nn.Module):
    """An NNX module as a Linen module."""

    description: Description

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Any:
        """Calls the module, in the mode of `module.train()` or of `module.eval()`."""
        known = self.description.leaves
        if self.is_initializing():
            made = _leaves(_made(self.description.make, nnx.Rngs(self.make_rng("params"))))
            self._put({path: _value(leaf) for path, leaf in made.items()})
            return None
        before = self._values()
        state = nnx.from_flat_state(
            {path: _with_value(leaf, before[path]) for path, leaf in known.items()}
        )
        module: Any = nnx.merge(self.description.graphs[train], state)
        outputs = module(x, **({"train": train} if self.description.takes_train else {}))
        after = _leaves(module)
        for path, leaf in after.items():
            if path not in known and not isinstance(leaf, nnx.Intermediate):
                raise UserError(
                    f"the model's state {'/'.join(map(str, path))} is created by a call of the "
                    "model",
                    "create it in __init__",
                )
            if isinstance(leaf, nnx.Param) and _value(leaf) is not before[path]:
                raise UserError(
                    f"a call of the model changes its parameter {'/'.join(map(str, path))}",
                    "only the optimizer may change it; use another type of nnx.Variable",
                )
        self._put({path: _value(leaf) for path, leaf in after.items() if path in known})
        return outputs

    def _values(self) -> dict[Path, Any]:
        """The values of all variables, with random keys derived from that of the call."""
        flat = traverse_util.flatten_dict(dict(self.variables))
        key = self.make_rng("dropout") if self.has_rng("dropout") else jax.random.key(0)
        values = {}
        for number, (path, leaf) in enumerate(self.description.leaves.items()):
            collection, shape = _collection(leaf), _value(leaf).shape
            if collection:
                values[path] = flat[collection, *map(str, path)]
            elif isinstance(leaf, nnx.RngKey):
                drawn = jax.random.fold_in(key, number)
                values[path] = jax.random.split(drawn, shape) if shape else drawn
            else:
                values[path] = jnp.zeros(shape, _value(leaf).dtype)
        return values

    def _put(self, values: Mapping[Path, Any]) -> None:
        collections: dict[str, dict[Path, Any]] = {}
        for path, value in values.items():
            collection = _collection(self.description.leaves[path])
            if collection and self.is_mutable_collection(collection):
                collections.setdefault(collection, {})[tuple(map(str, path))] = value
        for collection, flat in collections.items():
            for name, tree in traverse_util.unflatten_dict(flat).items():
                self.put_variable(collection, name, tree)


def _made(make: Callable[[nnx.Rngs], Any], rngs: nnx.Rngs) -> Any:
    # A module's own sharding annotations name mesh axes that do not exist here.
    with nnx.use_eager_sharding(False):
        return make(rngs)


def _leaves(module: Any) -> dict[Path, Any]:
    return dict(nnx.to_flat_state(nnx.state(module)))


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _with_value(leaf: Any, value: Any) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _collection(leaf: Any) -> str:
    """The Linen collection of a variable; empty if it is not part of the state."""
    if isinstance(leaf, nnx.Param):
        return "params"
    if isinstance(leaf, nnx.RngState):
        return ""
    if not isinstance(leaf, nnx.Variable):
        return "arrays"
    return nnx.variable_name_from_type(type(leaf), allow_register=True)
