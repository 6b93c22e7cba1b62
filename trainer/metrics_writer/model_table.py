"""A table of a model's modules, from one trace on shapes: nothing is compiled or run.

(`nn.tabulate` compiles each module to count FLOPs: minutes for ResNet-50.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from trainer.state.leaves import count_params, name_leaves
from trainer.state.train_state import TrainState
from trainer.step.analysis import count_flops_by_scope
from trainer.step.task import AXIS, Task

Path = tuple[str, ...]

# Tells the scopes of modules from those that the model opens itself.
_MARK = "module:"


@dataclass(frozen=True)
class Row:
    """A module with its submodules.

    Attributes:
        path: the names from the model, `()`, to the module.
        kind: the name of its class; empty if only its parameters are known.
        shapes: of its outputs for one example, at its first call.
        params: the size of its parameters.
        flops: of its matmuls and convolutions in the forward pass of one example.
    """

    path: Path
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    params: int
    flops: int


def model_rows(task: Task, state: TrainState, x: jax.ShapeDtypeStruct, depth: int) -> list[Row]:
    """The model, then its modules in the order of their first calls.

    Args:
        task: with the model.
        state: a state, or its shapes.
        x: one example, without a batch axis, as a shape.
        depth: levels below the model.
    """
    kinds: dict[Path, str] = {}
    shapes: dict[Path, tuple[tuple[int, ...], ...]] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path, method = context.module.path, context.method_name
        if method == "setup" or (method.startswith("_") and method != "__call__"):
            return call(*args, **kwargs)
        kinds.setdefault(path, type(context.module).__name__)
        with jax.named_scope(_MARK + ".".join(path)):
            outputs = call(*args, **kwargs)
        # Without the batch axis, of size one.
        shapes.setdefault(path, tuple(leaf.shape[1:] for leaf in jax.tree.leaves(outputs)))
        return outputs

    def forward(state: TrainState, batch: Mapping[str, jax.Array]) -> Any:
        rng = jax.random.wrap_key_data(state.rng)
        with nn.intercept_methods(note):
            return task.apply(state.params, state.model_state, batch, train=False, rng=rng)[0]

    mapped = jax.vmap(forward, axis_name=AXIS, in_axes=(None, 0))
    jaxpr = jax.make_jaxpr(mapped)(state, {"x": jax.ShapeDtypeStruct((1, 1, *x.shape), x.dtype)})
    flops: Counter[Path] = Counter()
    for scope, count in count_flops_by_scope(jaxpr, _MARK).items():
        names = tuple(scope.split(".")) if scope else ()
        for length in range(len(names) + 1):
            flops[names[:length]] += count
    params = _params_of(state.params)
    # Parts of an NNX module are not called through Linen: only their parameters are known.
    paths = [path for path in dict.fromkeys((*kinds, *params)) if len(path) <= depth]
    return [
        Row(path, kinds.get(path, ""), shapes.get(path, ()), params[path], flops[path])
        for path in paths
    ]


def draw_table(rows: Sequence[Row]) -> str:
    """Rows as lines of text, the model last; "-" for unknown values."""
    cells = [("module", "output of an example", "parameters", "FLOPs an example")]
    for row in (*(row for row in rows if row.path), *(row for row in rows if not row.path)):
        name = "/".join(row.path) or "all"
        shapes = ", ".join(str(shape) for shape in row.shapes) or "-"
        flops = f"{row.flops:,}" if row.kind else "-"
        if row.path and row.kind and not row.path[-1].startswith(f"{row.kind}_"):
            name += f" ({row.kind})"
        cells.append((name, shapes, f"{row.params:,}", flops))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}"
        for a, b, c, d in cells
    )


def _params_of(params: Any) -> Counter[Path]:
    """The number of parameters below each node of a tree, in the order of the tree."""
    counts: Counter[Path] = Counter()
    for name, leaf in name_leaves(params).items():
        node = tuple(name.split("/"))[:-1]
        for length in range(len(node) + 1):
            counts[node[:length]] += count_params(leaf)
    return counts
