"""What the end of a worker means."""

from __future__ import annotations

import pytest

from launcher.processes.failure import failure_from_exit
from launcher.processes.lost_peers import LostPeers


@pytest.mark.parametrize(
    ("returncode", "code", "text"),
    [
        (-9, 42, "killed by SIGKILL around step 7: the kernel ran out of memory"),
        (-15, 42, "killed by SIGTERM"),
        (-11, 1, "killed by SIGSEGV"),
        (-6, 1, "killed by SIGABRT"),
        (3, 1, "exited with code 3 and no error message"),
        (0, 1, "exited with code 0 and no error message"),
    ],
)
def test_an_exit_without_an_outcome(returncode, code, text):
    failure = failure_from_exit(returncode, 1, 7, "log", LostPeers(), out_of_memory=True)
    assert failure.exit_code == code
    assert text in failure.message
