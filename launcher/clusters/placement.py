"""The place of a process in its job, and the interface of a scheduler's module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Placement:
    """The place of this process in its job.

    Attributes:
        cluster: the scheduler's name in `detect.CLUSTERS`, or "by hand".
        host: of rank 0, where the ranks rendezvous; an IPv6 address has no brackets.
        port: where the launcher of rank 0 listens for the others. jax's coordinator has another,
            chosen anew at each attempt.
        num_processes: number of processes in the job, 1 or more.
        process_id: the rank of this process, from 0.
        local_device_ids: the accelerators of this process, as indices into the visible ones; None
            for all of them.
        attempt: how often the scheduler has restarted the job.
        job: identifies the job: the same on all its ranks, different from any other job's.
        variables: names of the variables that decided.
    """

    cluster: str
    host: str
    port: int
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None
    attempt: int
    job: str
    variables: tuple[str, ...]


class Cluster(Protocol):
    """A scheduler. Every answer comes from the variables alone."""

    @property
    def name(self) -> str:
        """The value of `--cluster`."""

    @property
    def required(self) -> tuple[tuple[str, ...], ...]:
        """The variables it needs, each as a tuple of alternatives."""

    @property
    def variables(self) -> tuple[str, ...]:
        """All variables it reads to find the ranks."""

    @property
    def hint(self) -> str:
        """What to do if a required variable is missing."""

    def detect(self, env: Mapping[str, str]) -> bool:
        """Whether this process belongs to such a job; raises UserError where that is half true."""

    def address(self, env: Mapping[str, str]) -> tuple[str, int]:
        """The host of rank 0, and the port where its launcher listens."""

    def size(self, env: Mapping[str, str]) -> int:
        """The number of processes in the job."""

    def rank(self, env: Mapping[str, str]) -> int:
        """The rank of this process."""

    def local_device_ids(self, env: Mapping[str, str]) -> tuple[int, ...] | None:
        """Its accelerators, as indices into the visible ones; None for all of them."""

    def attempt(self, env: Mapping[str, str]) -> int:
        """How often the scheduler has restarted the job."""

    def job(self, env: Mapping[str, str]) -> str:
        """A name that no other job has."""
