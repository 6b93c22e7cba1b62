"""Targets: a config names code by import path, `target="package.module:attribute"`."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trainer.config import trust
from trainer.errors import UserError


def resolve(target: Any, where: str) -> Any:
    """Imports the object that a target names.

    Args:
        target: `"package.module:attribute"`; the attribute may be dotted.
        where: the config key of the block, for error messages.

    Raises:
        UserError: the target is malformed, its module or attribute does not exist, or a limit of
            `trainer.config.trust` does not allow it.
    """
    if not isinstance(target, str) or target.count(":") != 1 or not all(target.split(":")):
        raise UserError(
            f"{where}.target={target!r} does not name code",
            'write "package.module:attribute", for example "trainer.models.mlp:MLP"',
        )
    module_name, attribute = target.split(":")
    limit = trust.limit()
    if limit is not None:
        limit.check_module(target, where)
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing module on the path itself is a typo; a failing import inside that module is not.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{where}.target={target!r}: importing {module_name} needs the module "
                f"{error.name!r}, which is not installed"
            ) from error
        raise UserError(
            f"{where}.target={target!r}: there is no module {error.name!r}",
            _did_you_mean(error.name, _siblings(error.name))
            or "install it, or run from the folder that contains it",
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise UserError(
                f"{where}.target={target!r}: {module_name} has no {name!r}",
                _did_you_mean(name, [n for n in dir(found) if not n.startswith("_")]),
            )
        found = getattr(found, name)
        if limit is not None:
            limit.check_found(found, target, where)
    return found


def build(block: Mapping[str, Any], where: str, **offered: Any) -> Any:
    """Calls a block's target with the rest of the block as keyword arguments.

    Args:
        block: a target and its arguments. A value that is itself a block with a `target` is built
            first.
        where: the config key of the block, for error messages.
        offered: arguments to pass if the callable has a parameter of that name and the block does
            not set it; so a schedule that takes `num_steps` receives the length of the run.

    Raises:
        UserError: the target does not resolve or does not take these arguments.
    """
    function, arguments = _prepare(block, where, offered)
    try:
        _signature(function).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{where}: {block['target']}: {error}") from error
    except ValueError:  # some C functions have no signature
        pass
    return function(**arguments)


def takes(block: Mapping[str, Any], where: str, name: str) -> bool:
    """Whether the callable that a block names has a parameter of this name."""
    try:
        return name in _signature(resolve(block.get("target"), where)).parameters
    except (TypeError, ValueError):  # some C functions have no signature
        return False


def bind(block: Mapping[str, Any], where: str, **offered: Any) -> Callable[..., Any]:
    """The function that a block names, with the rest of the block bound as keyword arguments.

    The arguments are those of `build`.
    """
    function, arguments = _prepare(block, where, offered)
    return functools.partial(function, **arguments) if arguments else function


def _prepare(
    block: Mapping[str, Any], where: str, offered: Mapping[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    if "target" not in block:
        raise UserError(f"{where} has no target", f'set {where}.target="package.module:attribute"')
    function = resolve(block["target"], where)
    if not callable(function):
        raise UserError(f"{where}.target={block['target']!r} is not callable")
    arguments = {
        name: build(value, f"{where}.{name}", **offered)
        if isinstance(value, Mapping) and "target" in value
        else value
        for name, value in block.items()
        if name != "target"
    }
    try:
        parameters = _signature(function).parameters
    except (TypeError, ValueError):  # some C functions have no signature
        return function, arguments
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in arguments:
        if name not in parameters and not takes_any:
            raise UserError(
                f"{where}.{name}: {block['target']} takes no argument {name!r}",
                _did_you_mean(name, parameters)
                or (f"it takes {', '.join(parameters)}" if parameters else "it takes none"),
            )
    for name, value in offered.items():
        if name in parameters and arguments.get(name) is None:
            arguments[name] = value
    return function, arguments


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a call; the metaclass of NNX modules hides that of `__init__`."""
    if isinstance(function, type) and type(function).__call__ is not type.__call__:
        init: Any = inspect.getattr_static(function, "__init__")
        of_init = inspect.signature(init)
        return of_init.replace(parameters=list(of_init.parameters.values())[1:])
    return inspect.signature(function)


def _siblings(module_name: str) -> list[str]:
    parent, _, _ = module_name.rpartition(".")
    try:
        paths = importlib.import_module(parent).__path__ if parent else None
    except (ImportError, AttributeError):
        return []
    prefix = f"{parent}." if parent else ""
    return [module.name for module in pkgutil.iter_modules(paths, prefix)]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""
