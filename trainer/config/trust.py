"""Which targets may run when a config comes with a folder that somebody else may have written.

A target is a name in a file. `eval`, `predict` and `export` read the file from the run's folder, so
without a limit whoever made the folder chooses the code that runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

from trainer.errors import UserError

# The rooms of podlift that are there to be named by configs; others read and write files.
_ROOMS = ("data", "losses", "metrics", "models", "optimizers", "schedules")
_NEVER_OWN = ("trainer", "launcher")


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a config from a folder may name: podlift, optax, and packages of the current folder.

    Attributes:
        place: the folder.
        given: further targets, which the user has typed.
    """

    place: str
    given: frozenset[str] = frozenset()

    def check_module(self, target: str, where: str) -> None:
        """Checks a target before its module is imported, which runs the module's code.

        Raises:
            UserError: the code is not of this user.
        """
        module, _, attribute = target.partition(":")
        if target not in self.given and (
            not self._trusts(module) or any(name.startswith("_") for name in attribute.split("."))
        ):
            raise self._refusal(target, where)

    def check_found(self, found: Any, target: str, where: str) -> None:
        """Checks what an attribute of a trusted module is: it may have been imported from another.

        Raises:
            UserError: it is of another module.
        """
        module = target.partition(":")[0]
        if isinstance(found, types.ModuleType):
            module = found.__name__
        elif isinstance(found, type) or hasattr(found, "__qualname__"):
            module = str(getattr(found, "__module__", ""))
        if target not in self.given and not self._trusts(module):
            raise self._refusal(target, where)

    def _trusts(self, module: str) -> bool:
        top, _, rest = module.partition(".")
        if top == "trainer":
            return rest.partition(".")[0] in _ROOMS
        return top == "optax" or (top not in _NEVER_OWN and self._is_own(top))

    def _is_own(self, top: str) -> bool:
        """Whether a top-level module lies directly in the current folder.

        Not if that is in the run's folder, or if the run's folder is in the module: both may have
        come together.
        """
        if top == "__main__":
            spec = getattr(sys.modules[top], "__spec__", None)
            return spec is None or spec.name.partition(".")[0] not in _NEVER_OWN
        here = os.path.realpath(os.getcwd())
        run = os.path.realpath(self.place) if "://" not in self.place else ""
        if here == os.path.dirname(os.__file__) or (run and _is_in(here, run)):
            return False
        try:
            spec = importlib.util.find_spec(top)  # imports nothing, for a name without a dot
        except (ImportError, ValueError):
            return False
        if spec is None:  # there is no such module, which is reported as for any config
            return True
        if spec.submodule_search_locations is not None:
            places = list(spec.submodule_search_locations)
        else:
            places = [spec.origin] if spec.has_location and spec.origin else []
        return bool(places) and all(
            os.path.realpath(os.path.dirname(os.path.abspath(place))) == here
            and not (run and _is_in(run, os.path.realpath(place)))
            for place in places
        )

    def _refusal(self, target: str, where: str) -> UserError:
        return UserError(
            f"{where}.target={target!r} in {self.place} names code that is neither of podlift or "
            f"optax nor of a package in {os.getcwd()}",
            "if you know who made that folder, --trust (trust=True in Python) runs what it names",
        )


def _is_in(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


_limit: Limit | None = None


def limit() -> Limit | None:
    """The limit in force; None where all targets may run."""
    return _limit


def set_limit(new: Limit | None) -> None:
    """Sets the limit for all threads of this process."""
    global _limit
    _limit = new


def allow(target: str) -> None:
    """Lets a limit in force permit one more target, which this program has chosen."""
    if _limit is not None:
        set_limit(dataclasses.replace(_limit, given=_limit.given | {target}))


@contextlib.contextmanager
def limited(new: Limit | None) -> Iterator[None]:
    """Sets a limit, and restores the one before at the end."""
    before = _limit
    set_limit(new)
    try:
        yield
    finally:
        set_limit(before)
