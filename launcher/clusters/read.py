"""Reads variables: numbers, addresses, and the accelerators that a process sees.

An empty variable counts as not set: the downward API of Kubernetes sets one for a label that the
pod lacks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from trainer.errors import UserError

COORDINATOR = "PODLIFT_COORDINATOR_ADDRESS"
DEFAULT_PORT = 8476
BY_HAND = (
    "give each process --coordinator_address=HOST:PORT --num_processes=N --process_id=RANK, or "
    "--cluster=none to train on this machine alone"
)
SET_COORDINATOR = (
    f"set {COORDINATOR}=HOST:PORT to where rank 0 runs, the same for all ranks; or {BY_HAND}"
)
_PORTS = range(20000, 30000)  # below the ports that Linux gives to outgoing connections


def missing(env: Mapping[str, str], required: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The required variables that are not set, with alternatives written `A or B`."""
    return tuple(" or ".join(names) for names in required if not any(map(env.get, names)))


def integer(
    env: Mapping[str, str], *names: str, default: int | None = None, minimum: int | None = None
) -> int:
    """The integer in the first of several variables that is set.

    Args:
        env: the variables.
        names: of the variables, in order of preference.
        default: the value if none is set.
        minimum: the smallest valid value.

    Raises:
        UserError: none is set and there is no default, or the value is not an integer or too small.
    """
    for name in names:
        value = env.get(name)
        if not value:
            continue
        if not re.fullmatch(r"\s*-?[0-9]+\s*", value):
            raise UserError(f"{name}={value!r} is not an integer")
        if minimum is not None and int(value) < minimum:
            raise UserError(f"{name}={int(value)} is less than {minimum}")
        return int(value)
    if default is None:
        raise UserError(f"{' or '.join(names)} is not set")
    return default


def index(
    env: Mapping[str, str], name: str, count: int, of: str, default: int | None = None
) -> int:
    """The index in a variable, from 0 to `count - 1`.

    Args:
        env: the variables.
        name: of the variable.
        count: number of things that are indexed.
        of: what they are, for the message.
        default: the value if the variable is not set.

    Raises:
        UserError: the variable is not set and has no default, is no integer, or is out of range.
    """
    value = integer(env, name, default=default)
    if not 0 <= value < count:
        raise UserError(f"{name}={value} is not in 0..{count - 1}: there are {count} {of}")
    return value


def split_address(text: str) -> tuple[str, int | None]:
    """Splits `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT` into host and port, if any.

    Raises:
        ValueError: the text is none of these, or the port is not in 1..65535.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:/\[\],]+))(?::([0-9]{1,5}))?", text)
    if match is None or (match[3] and not 1 <= int(match[3]) <= 65535):
        raise ValueError(text)
    return match[1] or match[2], int(match[3]) if match[3] else None


def parse_address(text: str, what: str, default_port: int | None = None) -> tuple[str, int]:
    """The host and port of an address that a user wrote.

    Args:
        text: `HOST:PORT`, with IPv6 addresses in brackets.
        what: the flag or variable it comes from, for the message.
        default_port: the port if the text has none; None if it must have one.

    Raises:
        UserError: the address is malformed.
    """
    try:
        host, port = split_address(text.strip())
    except ValueError:
        host, port = "", None
    port = default_port if port is None else port
    if not host or port is None:
        raise UserError(f"{what}={text}: not an address", f"{what}=HOST:PORT, or [IPV6]:PORT")
    return host, port


def port_of(number: int) -> int:
    """A port in 20000..29999, the same on all ranks; numbers close together get different ones."""
    return _PORTS[number % len(_PORTS)]


def visible_devices(env: Mapping[str, str]) -> int | None:
    """The number of accelerators that CUDA or ROCm shows to this process; None if not set.

    On ROCm HIP_VISIBLE_DEVICES filters what ROCR_VISIBLE_DEVICES leaves, so the smaller one counts.
    """
    if "CUDA_VISIBLE_DEVICES" in env:
        return _count(env["CUDA_VISIBLE_DEVICES"])
    rocm = [env[name] for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in env]
    return min(map(_count, rocm)) if rocm else None


def _count(devices: str) -> int:
    """The length of a list of devices. CUDA ignores what follows the first invalid one."""
    names = [name.strip() for name in devices.split(",")]
    for i, name in enumerate(names):
        if name in ("", "-1", "NoDevFiles"):
            return i
    return len(names)


def device_share(
    visible: int | None, on_node: int | None, tasks: int, local_rank: int, bound: bool, hint: str
) -> tuple[int, ...] | None:
    """This process's share of the visible accelerators.

    jax's own detection always takes device `local_rank`. That is wrong where each task is bound to
    its own devices, because it sees only those, numbered from 0. And where there are more devices
    than tasks, it leaves some idle.

    A task counts as bound if all tasks could see different devices, and either the scheduler says
    so or there are too few devices for an equal share. Otherwise (for example where a user's script
    splits 8 devices into 4 and 4) each task takes its share of what it sees, which may leave
    devices idle but never gives one device to two tasks.

    Args:
        visible: number of accelerators that this process sees; None if unknown.
        on_node: number of accelerators of this node, for all tasks; None if unknown.
        tasks: number of processes of the job on this node.
        local_rank: index of this process among them.
        bound: whether the scheduler says that each task has its own accelerators.
        hint: what to do if they cannot be shared.

    Returns:
        Indices into the visible accelerators; None for all of them.

    Raises:
        UserError: the accelerators cannot be shared equally.
    """
    if tasks == 1 or not visible:
        return None
    may_differ = on_node is None or visible * tasks <= on_node
    if may_differ and (bound or visible < tasks):
        return None
    share, rest = divmod(visible, tasks)
    if rest:
        raise UserError(f"{tasks} tasks on this node cannot share {visible} accelerators", hint)
    return tuple(range(local_rank * share, (local_rank + 1) * share))


def unbound_share(
    env: Mapping[str, str], tasks: int, local_rank: int, hint: str
) -> tuple[int, ...] | None:
    """A process's share of the accelerators, from a launcher that does not bind them.

    Args:
        env: the variables; the launcher sets PODLIFT_NUM_GPUS to the number of this machine's GPUs.
        tasks: number of processes of the job on this machine.
        local_rank: index of this process among them.
        hint: what to do if they cannot be shared.

    Returns:
        Indices into the visible accelerators; None for all of them.

    Raises:
        UserError: the accelerators cannot be shared equally.
    """
    on_node = integer(env, "PODLIFT_NUM_GPUS", default=0) or None
    visible = visible_devices(env)
    visible = on_node if visible is None else visible
    return device_share(visible, on_node, tasks, local_rank, False, hint)
