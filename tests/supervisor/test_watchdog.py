"""Which workers make no progress."""

from __future__ import annotations

from launcher.processes.progress_page import Progress
from launcher.supervisor.watchdog import Watchdog


def test_the_watchdog_is_patient_outside_training():
    watchdog = Watchdog(timeout=60)

    def check(now, *reports):
        return watchdog.check({rank: Progress(*p) for rank, p in enumerate(reports)}, now)

    assert check(0, (1, 0, "compile"), (1, 0, "compile")) is None
    assert check(590, (1, 0, "compile"), (1, 0, "compile")) is None
    assert check(591, (2, 1, "train"), (2, 1, "train")) is None
    assert check(650, (9, 8, "train"), (7, 6, "train")) is None
    assert check(700, (9, 8, "train"), (7, 6, "train")) is None
    stuck = check(711, (9, 8, "train"), (7, 6, "train"))
    assert (stuck.rank, stuck.progress.step, stuck.seconds) == (1, 6, 61)
    # One that is suspended holds up the others, however far it has come.
    stuck = watchdog.check({0: Progress(9, 8, "train"), 1: Progress(7, 6, "train")}, 712, {0})
    assert (stuck.rank, stuck.is_suspended) == (0, True)
    # A rank that has ended is not waited for.
    assert watchdog.check({0: Progress(10, 8, "save")}, 800) is None
