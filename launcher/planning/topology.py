"""The names of topologies: `v5e:16x16`, `gpu:h100:1x4x8`, `cpu:8`. Nothing here imports jax."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from launcher.planning.chips import CHIPS, Chip
from trainer.errors import UserError

# Shapes that clouds offer or tests use; a compiler may accept others.
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16"),
)
_SHAPES: dict[str, tuple[str, ...]] = {
    "v2": ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v3": ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"),
    "v4": _CUBES,
    "v5e": ("1x1", *_SQUARES),
    "v5p": (*_CUBES, "16x16x24"),
    "v6e": ("1x1", *_SQUARES),
    "tpu7x": _CUBES,
}
_GPUS = ("h100", "a100", "l4")
# Names with a number of chips or cores: `v5e-256`.
_COUNTED = re.compile(r"(v2|v3|v4|v5p|v5e|v6e|v5litepod)-([1-9][0-9]*)")
# These count cores, two per chip.
_CORES = ("v2", "v3", "v4", "v5p")
# More than exist, but few enough for a quick answer.
_MOST_DEVICES = 1 << 20


@dataclass(frozen=True)
class Topology:
    """Devices that may not be here.

    Attributes:
        name: as the user wrote it.
        platform: "tpu", "gpu" or "cpu".
        chip: the kind of chip; None for CPU devices.
        shape: chips along each axis of a TPU slice; hosts and GPUs per host of a GPU cluster;
            number of CPU devices.
        num_slices: number of slices (or GPU clusters), joined by a data centre's network.
    """

    name: str
    platform: str
    chip: Chip | None
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def chips_per_slice(self) -> int:
        """Chips of one slice."""
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        """Chips in all slices."""
        return self.chips_per_slice * self.num_slices

    @property
    def num_devices(self) -> int:
        """Devices as jax counts them; some TPU chips count as two."""
        return self.num_chips * (self.chip.devices_per_chip if self.chip else 1)

    @property
    def slice_name(self) -> str:
        """The compiler's name of a TPU slice."""
        assert self.chip is not None
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def label(self) -> str:
        """The name, with the number of slices of --num_slices."""
        slices = self.num_slices > 1 and self.platform == "tpu"
        return f"{self.num_slices} x {self.name}" if slices else self.name

    @property
    def num_hosts(self) -> int:
        """Processes of a run."""
        if self.chip is None:
            return 1
        if self.platform == "gpu":
            return self.num_slices * self.shape[0]
        return self.num_slices * max(1, self.chips_per_slice // self.chip.chips_per_host)


def known_topologies() -> list[str]:
    """Names for messages."""
    tpus = [f"{chip}:{shape}" for chip, shapes in _SHAPES.items() for shape in shapes]
    return [*tpus, *(f"gpu:{gpu}:{s}" for gpu in _GPUS for s in ("1x1x8", "1x4x8")), "cpu:8"]


def is_topology(text: str) -> bool:
    """Whether a text looks like the name of a topology, valid or not."""
    return re.fullmatch(r"[a-z]+\w*:\w+(:\w+)?|" + _COUNTED.pattern, text) is not None


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """Reads the name of a topology.

    Args:
        text: `CHIP:AxB` or `CHIP:AxBxC` for a TPU slice, `gpu:CHIP:HxG` or `gpu:CHIP:SxHxG` for S
            clusters of H hosts with G GPUs each, `cpu:N`.
        num_slices: number of TPU slices, or of GPU clusters if the text does not say.

    Raises:
        UserError: the name is unknown; the hint lists similar names.
    """
    name, counted = text.lower(), _COUNTED.fullmatch(text.lower())
    if counted:
        kind = "v5e" if counted[1] == "v5litepod" else counted[1]
        by_count = {math.prod(_dims(shape)): shape for shape in _SHAPES[kind]}
        chips = int(counted[2]) // 2 if kind in _CORES else int(counted[2])
        if chips in by_count:
            name = f"{kind}:{by_count[chips]}"
    name = name.replace("v7x:", "tpu7x:") if name.startswith("v7x:") else name
    kind, _, rest = name.partition(":")
    if kind == "cpu" and len(_dims(rest)) == 1:
        if num_slices > 1:
            raise UserError(f"--num_slices={num_slices}: cpu devices have no slices")
        return _checked(Topology(text, "cpu", None, _dims(rest)))
    if kind == "gpu":
        gpu, _, dims = rest.partition(":")
        sizes = _dims(dims)
        if gpu in _GPUS and len(sizes) in (2, 3):
            if len(sizes) == 3 and num_slices > 1:
                raise UserError(
                    f"--num_slices={num_slices} and --topology={text} both set the clusters",
                    "leave one of them out",
                )
            slices = sizes[0] if len(sizes) == 3 else num_slices
            return _checked(Topology(text, "gpu", CHIPS[gpu], sizes[-2:], slices))
    elif kind in _SHAPES:
        sizes = _dims(rest)
        if len(sizes) == len(_dims(_SHAPES[kind][0])):
            topology = Topology(text, "tpu", CHIPS[kind], sizes, num_slices)
            if topology.chips_per_slice > CHIPS[kind].max_chips:
                raise UserError(
                    f"--topology={text}: {kind} slices have at most {CHIPS[kind].max_chips} chips",
                    f"--topology={kind}:{_SHAPES[kind][-1]} --num_slices=N joins several",
                )
            return _checked(topology)
    raise unknown_topology(text)


def _checked(topology: Topology) -> Topology:
    if topology.num_devices > _MOST_DEVICES:
        raise UserError(
            f"--topology={topology.name} has {topology.num_devices:,} devices",
            f"at most {_MOST_DEVICES:,} are possible",
        )
    return topology


def unknown_topology(text: str, why: str = "") -> UserError:
    """The error for an unknown name, with similar ones."""
    known = known_topologies()
    near = difflib.get_close_matches(text.lower(), known, n=3, cutoff=0.5)
    kind = re.split("[:-]", text.lower())[0]
    near = near or [name for name in known if name.startswith(f"{kind}:")][:6]
    others = ", ".join(near) if near else "v5e:4x4, v6e:16x16, v5p:4x4x4, gpu:h100:1x4x8, cpu:8"
    return UserError(
        f"there is no topology {text!r}{f' ({why})' if why else ''}",
        f"similar ones: {others}; the form is CHIP:AxB, gpu:CHIP:HOSTSxGPUS or cpu:N, where CHIP "
        f"is one of {', '.join([*_SHAPES, *_GPUS])}",
    )


def _dims(text: str) -> tuple[int, ...]:
    """`4x8` as (4, 8); () for another form."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        return ()
    return tuple(map(int, text.split("x")))
