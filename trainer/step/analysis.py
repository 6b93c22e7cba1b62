"""Properties of a function, found by tracing it on shapes; nothing is compiled or run.

FLOPs are those of matmuls and convolutions, counted from the jaxpr. The count does not depend on a
compiler and multiplies loops out; XLA's own analysis counts the body of a loop once, and ignores
what a GPU library computes. All else that a step does is bound by memory and not counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from trainer.step.task import AXIS


def count_flops(jaxpr: Any) -> Counter[str]:
    """Operations of one call by the dtype of the factors; a multiply-add counts as two.

    Args:
        jaxpr: closed or open. A `cond` counts as its largest branch, a `while` as one iteration.
    """
    total: Counter[str] = Counter()
    for (dtype, _), count in _count(jaxpr, "", "").items():
        total[dtype] += count
    return total


def count_flops_by_scope(jaxpr: Any, mark: str) -> Counter[str]:
    """Operations of one call by scope.

    Args:
        jaxpr: as for `count_flops`.
        mark: a prefix. An operation counts for the innermost `jax.named_scope` whose name begins
            with it; the keys of the result are those names without the prefix.
    """
    total: Counter[str] = Counter()
    for (_, scope), count in _count(jaxpr, mark, "").items():
        total[scope] += count
    return total


def _count(jaxpr: Any, mark: str, scope: str) -> Counter[tuple[str, str]]:
    """Operations by dtype and scope; `scope` is that of the equation that contains this jaxpr."""
    total: Counter[tuple[str, str]] = Counter()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        here = _scope_of(equation, mark) if mark else None
        here = scope if here is None else here
        if name in ("dot_general", "conv_general_dilated"):
            count = _dot(equation) if name == "dot_general" else _convolution(equation)
            total[str(equation.invars[0].aval.dtype), here] += count
        elif name == "cond":
            branches = [_count(branch, mark, here) for branch in params["branches"]]
            total += branches[int(np.argmax([branch.total() for branch in branches]))]
        else:
            times = params["length"] if name == "scan" else 1
            for inner in _inner(params):
                found = _count(inner, mark, here)
                total += Counter({key: times * count for key, count in found.items()})
    return total


def _scope_of(equation: Any, mark: str) -> str | None:
    names = re.findall(rf"{mark}([^/()]*)", str(equation.source_info.name_stack))
    return names[-1] if names else None


def flops_of_step(
    step: Callable[[Any, Any], Any], state: Any, batch: Mapping[str, jax.ShapeDtypeStruct]
) -> Counter[str]:
    """`count_flops` of a per-shard step, traced on shapes; nothing is compiled or run.

    Args:
        step: `(state, batch) -> any`, written for one shard.
        state: a state, or its shapes.
        batch: the shapes of one shard of a batch.
    """
    mapped = jax.vmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None)
    one = {k: jax.ShapeDtypeStruct((1, *v.shape), v.dtype) for k, v in batch.items()}
    return count_flops(jax.make_jaxpr(mapped)(state, one))


def _inner(params: Any) -> list[Any]:
    """All jaxprs among the parameters of an equation."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                found.append(item)
    return found


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    outputs, depth = (
        math.prod(equation.outvars[0].aval.shape),
        math.prod(left[d] for d in contracted),
    )
    return 2 * int(outputs * depth)


def _convolution(equation: Any) -> int:
    """Counts products of an input with a kernel value, none with padding or dilation holes."""
    params = equation.params
    numbers = params["dimension_numbers"]
    image, kernel = (variable.aval.shape for variable in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    pairs = math.prod(
        _products(
            image[numbers.lhs_spec[2 + axis]],
            kernel[numbers.rhs_spec[2 + axis]],
            out[numbers.out_spec[2 + axis]],
            params["window_strides"][axis],
            params["padding"][axis],
            params["lhs_dilation"][axis],
            params["rhs_dilation"][axis],
        )
        for axis in range(len(image) - 2)
    )
    # The kernel's shape holds the input features of one group only.
    outer = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    return 2 * pairs * int(outer)


def _products(
    size: int,
    kernel: int,
    out: int,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    kernel_dilation: int,
) -> int:
    """Along one axis: pairs of an output and a kernel position that meet an input value."""
    places = np.arange(out)[:, None] * stride - padding[0]
    places = places + np.arange(kernel)[None, :] * kernel_dilation
    inside = (places >= 0) & (places < (size - 1) * dilation + 1)
    return int(np.count_nonzero(inside & (places % dilation == 0)))


def has_convolution(function: Callable[[Any, Any], Any], state: Any, batch: Any) -> bool:
    """Whether a per-shard function contains a convolution.

    Args:
        function: `(state, batch) -> any`, written for one shard.
        state: a state, or its shapes.
        batch: the shapes of one shard of a batch, with a leading axis of size 1.
    """
    mapped = jax.vmap(function, axis_name=AXIS, in_axes=(None, 0), out_axes=None)
    return "conv_general_dilated" in str(jax.make_jaxpr(mapped)(state, batch))


def rematerialises(function: Callable[..., Any], *args: Any) -> bool:
    """Whether a function contains a `jax.checkpoint` (`nn.remat`).

    Args:
        function: takes arrays; may use the axes that are bound at the call.
        args: arrays, tracers or shapes.
    """
    return re.search(r"\b(remat2?|checkpoint)\[", str(jax.make_jaxpr(function)(*args))) is not None
