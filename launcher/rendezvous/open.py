"""The rendezvous that a launch needs: as server, as client, or alone."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import platform
import socket
import subprocess

from launcher.clusters.placement import Placement
from launcher.launch.spec import LaunchSpec
from launcher.processes.event_loop import EventLoop
from launcher.processes.rank_log import claim_attempt
from launcher.rendezvous.client import Client
from launcher.rendezvous.late import Late
from launcher.rendezvous.protocol import HEARTBEAT_SECS, Hello, Listener, Rendezvous
from launcher.rendezvous.root_cause import MakeRootCause
from launcher.rendezvous.secret import JobSecret
from launcher.rendezvous.server import Server
from launcher.rendezvous.single import SingleLauncher
from trainer.errors import UserError
from trainer.version import __version__


def open_rendezvous(
    spec: LaunchSpec,
    loop: EventLoop,
    listener: Listener,
    make_root_cause: MakeRootCause,
    watch_secs: float,
    address: str,
) -> Rendezvous:
    """Makes the rendezvous of one attempt; `Rendezvous.open` begins it.

    Args:
        spec: what to run.
        loop: of this launcher.
        listener: gets the events.
        make_root_cause: makes what decides which failure came first, if this launcher decides.
        watch_secs: seconds between two checks of a launcher on its workers.
        address: where rank 0 listens; empty for all addresses of its host.

    Raises:
        UserError: the port of the rendezvous is taken, or the job has no secret.
    """
    late = Late(spec.num_processes, 2 * watch_secs + HEARTBEAT_SECS, loop.time)
    placement = spec.placement
    if placement is None:
        number = claim_attempt(spec.local_dir)
        return SingleLauncher(number, spec.num_processes, listener, make_root_cause, late)
    hello = _make_hello(spec, placement)
    secret = JobSecret(spec.workdir, os.environ)
    limits = spec.limits
    timeouts = (limits.rendezvous_timeout_secs, float(limits.heartbeat_timeout_secs))
    if hello.rank != 0:
        answer_timeout = watch_secs + 5 * HEARTBEAT_SECS
        target = (placement.host, placement.port)
        return Client(loop, hello, *target, listener, *timeouts, answer_timeout, secret)
    number_attempt = functools.partial(claim_attempt, spec.local_dir)
    try:
        return Server(
            loop,
            hello,
            placement.port,
            address,
            number_attempt,
            listener,
            make_root_cause,
            late,
            *timeouts,
            secret,
        )
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        by_hand = placement.cluster == "by hand"
        setting = "--coordinator_address" if by_hand else "PODLIFT_COORDINATOR_ADDRESS"
        raise UserError(
            f"port {placement.port} of {hello.host}, for the rendezvous of the ranks, is taken",
            f"by another job, or by another rank 0 of this one? {setting}=HOST:PORT, the same "
            "for all ranks, names another port",
        ) from error


def code_version(folder: str = ".") -> list[str]:
    """The git commit of a folder and a digest of the changes since; empty without git.

    Args:
        folder: the current one, where users keep their own code.
    """

    def git(*arguments: str) -> bytes:
        return subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, timeout=10, check=True
        ).stdout

    try:
        commit = git("rev-parse", "--short=12", "HEAD").decode().strip()
        changes = git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return []
    changed = f" with changes {hashlib.sha256(changes).hexdigest()[:8]}" if changes else ""
    return [f"code {commit}{changed}"]


def _make_hello(spec: LaunchSpec, placement: Placement) -> Hello:
    import importlib.metadata  # takes 30 ms, which a single launcher does not need

    packages = ("jax", "jaxlib", "flax", "optax")
    versions = [f"podlift {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in packages]
    versions += code_version()
    return Hello(
        rank=placement.process_id,
        size=placement.num_processes,
        host=socket.gethostname(),
        job=placement.job,
        config=spec.config,
        versions=", ".join(versions),
        workdir=spec.workdir,
        sees_run=spec.folder.exists,
    )
