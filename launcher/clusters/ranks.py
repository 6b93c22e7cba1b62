"""Launchers that give rank, size and the address of rank 0 in a variable each.

They differ in the names of the variables, so a launcher is a row of names; `launchers.py` has them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.clusters import read
from trainer.errors import UserError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Ranks:
    """A launcher as the names of its variables. Of several names, the first that is set counts.

    Attributes:
        name: the value of `--cluster`.
        rank_names: the rank of this process.
        size_names: the number of processes.
        address_names: the host of rank 0, with or without a port, or a list that begins with it;
            empty if the launcher does not say.
        port_names: a port of that host, if it is in a variable of its own.
        marker_names: what this launcher sets besides, and others with the same names do not.
        local_rank_names: the index of this process among those on this machine; if the launcher
            does not give one, it starts one process on each.
        local_size_names: the number of processes on this machine.
        nodes_names: the number of machines.
        job_names: together they identify the job; without one, the address of rank 0 does.
        attempt_names: how often the launcher has restarted the job.
        listens: whether the launcher itself, or a library, may listen at the port of the address.
    """

    name: str
    rank_names: tuple[str, ...]
    size_names: tuple[str, ...]
    address_names: tuple[str, ...] = ()
    port_names: tuple[str, ...] = ()
    marker_names: tuple[str, ...] = ()
    local_rank_names: tuple[str, ...] = ()
    local_size_names: tuple[str, ...] = ()
    nodes_names: tuple[str, ...] = ()
    job_names: tuple[str, ...] = ()
    attempt_names: tuple[str, ...] = ()
    listens: bool = True

    @property
    def required(self) -> tuple[tuple[str, ...], ...]:
        """Rank, size and the marker."""
        marker = (self.marker_names,) if self.marker_names else ()
        return (self.rank_names, self.size_names, *marker)

    @property
    def variables(self) -> tuple[str, ...]:
        """All names."""
        groups = (
            self.rank_names,
            self.size_names,
            self.address_names,
            self.port_names,
            self.marker_names,
            self.local_rank_names,
            self.local_size_names,
            self.nodes_names,
            self.job_names,
            self.attempt_names,
        )
        return tuple(dict.fromkeys(name for group in groups for name in group))

    @property
    def hint(self) -> str:
        """What to do if a required variable is missing."""
        return read.BY_HAND

    def detect(self, env: Mapping[str, str]) -> bool:
        """Whether rank and size are there."""
        return not read.missing(env, self.required)

    def address(self, env: Mapping[str, str]) -> tuple[str, int]:
        """127.0.0.1 if all ranks are on this machine, otherwise what the variable says.

        The port is that of the address only where nothing else listens there. Otherwise it is
        derived from what identifies the job.

        Raises:
            UserError: no variable says where rank 0 is, or which job this is.
        """
        size = self.size(env)
        identity = self._identity(env)
        given, port = self._given_address(env)
        port = port if port and not self.listens else self._derived_port(identity, port)
        if size == 1 or self._local_size(env) == size:
            if size > 1 and not given and not identity:
                raise UserError(
                    f"{self._text(env, self.size_names)}, but no variable says which job this is",
                    read.SET_COORDINATOR,
                )
            return "127.0.0.1", port
        if not given:
            what = " or ".join(name for name in self.address_names if "/" not in name)
            lacks = f"{what} is not set" if what else "no variable says where rank 0 is"
            raise UserError(
                f"{self._text(env, self.size_names)}, but {lacks}", read.SET_COORDINATOR
            )
        return given, port

    def size(self, env: Mapping[str, str]) -> int:
        """The number of processes."""
        return read.integer(env, *self.size_names)

    def rank(self, env: Mapping[str, str]) -> int:
        """The rank of this process."""
        return read.integer(env, *self.rank_names)

    def local_device_ids(self, env: Mapping[str, str]) -> tuple[int, ...] | None:
        """This process's share of the GPUs that it sees.

        A launcher that gives a local rank without a local size expects the process to take the
        device of that number, as its scripts do with torch.
        """
        tasks, rank = self._local_size(env), self._local_rank(env)
        if tasks is None:
            visible = read.visible_devices(env)
            if visible is None:
                visible = read.integer(env, "PODLIFT_NUM_GPUS", default=0)
            return (rank,) if visible > rank and visible > 1 else None
        if not 0 <= rank < tasks:
            raise UserError(
                f"{self._text(env, self.local_rank_names)} is not in 0..{tasks - 1}: there are "
                f"{tasks} processes on this machine"
            )
        return read.unbound_share(env, tasks, rank, _HINT)

    def attempt(self, env: Mapping[str, str]) -> int:
        """How often the launcher has restarted the job."""
        names = (*self.attempt_names, "PODLIFT_RESTART_ATTEMPT")
        return read.integer(env, *names, default=0, minimum=0)

    def job(self, env: Mapping[str, str]) -> str:
        """`NAME ID`: what identifies the job, or else the address of rank 0."""
        return f"{self.name} {self._identity(env) or ':'.join(map(str, self.address(env)))}"

    def _identity(self, env: Mapping[str, str]) -> str:
        values = [env[name] for name in self.job_names if env.get(name)]
        return " ".join(values) or env.get(read.COORDINATOR, "")

    @staticmethod
    def _derived_port(identity: str, taken: int) -> int:
        if not identity:
            return read.DEFAULT_PORT
        # Not `hash`, which differs between processes. Flux writes its ids with an ƒ.
        port = read.port_of(zlib.crc32(identity.encode(errors="surrogateescape")))
        return port if port != taken else port + 1

    def _given_address(self, env: Mapping[str, str]) -> tuple[str, int]:
        """The host that the launcher gives for rank 0 and its port; "" and 0 for none."""
        name = next((name for name in self.address_names if env.get(name, "").strip()), None)
        if name is None:
            return "", 0
        first = re.split(r"[\s,]+", env[name].strip())[0]
        with contextlib.suppress(ValueError):  # a name, IPv4, or one with a port or brackets
            first = f"[{ipaddress.IPv6Address(first)}]"
        host, port = read.parse_address(first, name, 0)
        return host, read.integer(env, *self.port_names, default=port)

    def _local_size(self, env: Mapping[str, str]) -> int | None:
        """The number of processes on this machine; None if only a local rank is known."""
        if any(env.get(name) for name in self.local_size_names):
            return read.integer(env, *self.local_size_names, minimum=1)
        size = self.size(env)
        if self._given_address(env)[0] in _LOOPBACK:
            return size
        if any(env.get(name) for name in self.nodes_names):
            # Rounded up where the machines differ: some devices stay idle, none is given twice.
            return -(-size // read.integer(env, *self.nodes_names, minimum=1))
        return None if any(env.get(name) for name in self.local_rank_names) else 1

    def _local_rank(self, env: Mapping[str, str]) -> int:
        alone = self._given_address(env)[0] in _LOOPBACK
        return read.integer(
            env, *self.local_rank_names, default=self.rank(env) if alone else 0, minimum=0
        )

    def _text(self, env: Mapping[str, str], names: tuple[str, ...]) -> str:
        return next((f"{name}={env[name]}" for name in names if env.get(name)), names[0])


_HINT = "start one process a machine, or a number of processes that divides the accelerators"
