"""The meeting that a plan asks for."""

from __future__ import annotations

import errno
import functools
import hashlib
import platform
import socket
import subprocess

from launcher.clusters.placement import Placement
from launcher.launch.spec import LaunchSpec
from launcher.processes.event_loop import EventLoop
from launcher.processes.rank_log import claim_attempt
from launcher.rendezvous.address import own_address
from launcher.rendezvous.client import Client
from launcher.rendezvous.protocol import HEARTBEAT_SECS, Hello, Listener, Rendezvous
from launcher.rendezvous.root_cause import MakeRootCause
from launcher.rendezvous.server import Server
from launcher.rendezvous.single import SingleLauncher
from trainer.errors import UserError
from trainer.version import __version__


def open_rendezvous(
    plan: LaunchSpec,
    loop: EventLoop,
    listener: Listener,
    make_verdict: MakeRootCause,
    watch_secs: float,
) -> Rendezvous:
    """Makes the meeting of one attempt; `Rendezvous.open` begins it.

    Args:
        plan: what is run.
        loop: of this launcher.
        listener: whom to tell.
        make_verdict: of what decides which failure is the story, where that is decided here.
        watch_secs: how often launchers look at their workers.

    Raises:
        UserError: the port where the ranks are to meet is taken.
    """
    placement = plan.placement
    if placement is None:
        number = claim_attempt(plan.local_dir)
        return SingleLauncher(number, plan.num_processes, listener, make_verdict)
    card = _card_of(plan, placement)
    limits = plan.limits
    times = (limits.rendezvous_timeout_secs, float(limits.heartbeat_timeout_secs))
    if card.rank != 0:
        patience = watch_secs + 5 * HEARTBEAT_SECS
        return Client(loop, card, placement.host, placement.port, listener, *times, patience)
    address = own_address(placement.host)
    number_attempt = functools.partial(claim_attempt, plan.local_dir)
    try:
        return Server(
            loop, card, placement.port, address, number_attempt, listener, make_verdict, *times
        )
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        by_hand = placement.cluster == "by hand"
        knob = "--coordinator_address" if by_hand else "PODLIFT_COORDINATOR_ADDRESS"
        raise UserError(
            f"port {placement.port} of {card.host}, where the ranks are to meet, is taken",
            f"by another job, or by another rank 0 of this one? {knob}=HOST:PORT, the same "
            "for all ranks, names another port",
        ) from error


def code_version(folder: str = ".") -> list[str]:
    """The commit that is checked out in a folder, and what was changed since; empty without git.

    Args:
        folder: where users have their own code: the current one.
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


def _card_of(plan: LaunchSpec, placement: Placement) -> Hello:
    import importlib.metadata  # 30 ms, which a launcher alone has no use for

    packages = ("jax", "jaxlib", "flax", "optax")
    versions = [f"podlift {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in packages]
    versions += code_version()
    return Hello(
        rank=placement.process_id,
        size=placement.num_processes,
        host=socket.gethostname(),
        job=placement.job,
        config=plan.config,
        versions=", ".join(versions),
        workdir=plan.workdir,
        sees_run=plan.folder.exists,
    )
