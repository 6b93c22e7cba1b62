"""SLURM's notation for host names: `n[1-3,07],gpu-a[01-02],login`.

https://slurm.schedmd.com/slurm.conf.html, NodeName; `scontrol show hostnames` is the reference.
"""

from __future__ import annotations

import itertools
import re

from trainer.errors import UserError

_HOST = r"(?:[^\s,\[\]]|\[[^\s\[\]]*\])+"  # commas separate hosts except within brackets


def expand(hostlist: str) -> list[str]:
    """The host names in SLURM's order: as written, and the last bracket of a name varies fastest.

    Args:
        hostlist: names separated by commas, with ranges in brackets. The first number of a range
            sets the width to which its numbers are padded with zeros.

    Raises:
        UserError: the list is malformed.
    """
    if not re.fullmatch(f"{_HOST}(?:,{_HOST})*", hostlist):
        raise UserError(f"{hostlist!r} is not a list of hosts as SLURM writes them")
    names: list[str] = []
    for host in re.findall(_HOST, hostlist):
        # With a group in the pattern, re.split alternates between text and brackets.
        parts = [
            _numbers(part, hostlist) if i % 2 else [part]
            for i, part in enumerate(re.split(r"\[([^\]]*)\]", host))
        ]
        names.extend("".join(name) for name in itertools.product(*parts))
    return names


def _numbers(ranges: str, hostlist: str) -> list[str]:
    """The numbers of one bracket: `1-3,07` is 1, 2, 3, 07."""
    numbers: list[str] = []
    for item in ranges.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", item)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(last) < int(first):
            raise UserError(f"{hostlist!r}: {item!r} is not a range")
        numbers += [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return numbers


def expand_counts(counts: str) -> list[int]:
    """Expands SLURM's notation for one number a node: `4(x2),3` is [4, 4, 3].

    Raises:
        UserError: the list is malformed.
    """
    numbers: list[int] = []
    for item in counts.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", item)
        if match is None:
            raise UserError(f"{counts!r} is not a list of numbers as SLURM writes them")
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers
