"""Whether all processes have the same data: each takes its own rows of one order of examples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trainer.console import warn
from trainer.data.fingerprint import describe_changes, fingerprint_of
from trainer.data.stream import Source
from trainer.errors import UserError
from trainer.lift.processes import Processes


def agree_on_data(processes: Processes, sources: Mapping[str, Source | None]) -> dict[str, Any]:
    """Raises a UserError if processes have other examples than process 0.

    All processes call this at the same point. It costs each 25 reads of single rows a source.

    Args:
        processes: the processes.
        sources: by name, "train" or "eval"; None for no source.

    Returns:
        The fingerprints of the sources of process 0, by name, as JSON.
    """
    own = {name: fingerprint_of(s) for name, s in sources.items() if s is not None}
    agreed: dict[str, Any] = json.loads(processes.broadcast_text(json.dumps(own)))
    what = describe_changes(agreed, own)
    odd = [rank for rank, differs in enumerate(processes.gather(int(bool(what)))) if differs]
    if odd:
        what = processes.broadcast_text(what, odd[0])
        others = f" (so have ranks {', '.join(map(str, odd[1:]))})" if odd[1:] else ""
        raise UserError(
            f"rank {odd[0]} has other data than rank 0: {what}{others}",
            "every process must load the same examples in the same order: sort lists of files, "
            "keep no order of a set, seed random numbers, and give all hosts the same files",
        )
    if processes.writes:
        for name, fingerprint in agreed.items():
            if not fingerprint["rows"]:
                warn(
                    f'the "{name}" source returns other rows each time, so its numbers cannot be '
                    "repeated\n  HINT: draw random numbers in config.data.augment or "
                    "augmented(); docs/data.md"
                )
    return agreed
