"""A real SLURM on this machine: four nodes, munge, two partitions of which one preempts."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "srun", "sbatch", "munged", "unshare", "runuser")

CONFIG = """\
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={munge}/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=15
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 \
RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \
PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Why a SLURM cannot be started here; empty if it can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "needs root"


class Slurm:
    """The cluster. `environ` lets its commands find it.

    Args:
        folder: for its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Without what the tests set for their own jax.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "PJRT_"))}
        self.environ = {**inherited, "SLURM_CONF": str(folder / "slurm.conf")}
        self._munge = Path(tempfile.mkdtemp(prefix="munge-"))
        self._start_munge()
        # The nodes' names resolve in a mount namespace of their own, not in the machine's file.
        names = Path("/etc/hosts").read_text() + "\n127.0.0.1 n1 n2 n3 n4\n"
        (folder / "hosts").write_text(names)
        (folder / "state").mkdir()
        first = 20000 + os.getpid() % 2000 * 5
        text = CONFIG.format(
            host=socket.gethostname(),
            port=first,
            # Jobs of two clusters on this machine do not share a number, and so a port.
            first_job=os.getpid() % 30000 + 1,
            first=first + 1,
            last=first + 4,
            folder=folder,
            munge=self._munge,
        )
        (folder / "slurm.conf").write_text(text)
        commands = [f"mount --bind {folder}/hosts /etc/hosts", "slurmctld -c"]
        for node in range(1, 5):
            (folder / f"spool.n{node}").mkdir()
            commands.append(f"slurmd -c -N n{node}")
        subprocess.run(
            ["unshare", "--mount", "bash", "-ec", "\n".join(commands)],
            env=self.environ,
            check=True,
            timeout=30,
        )
        self.wait_for(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "4", 20)

    def _start_munge(self) -> None:
        key = self._munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for path in (self._munge, key):
            shutil.chown(path, "munge", "munge")
        self._munge.chmod(0o711)
        options = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
        options["seed-file"] = "seed"
        arguments = [f"--{name}={self._munge / file}" for name, file in options.items()]
        subprocess.run(
            ["runuser", "-u", "munge", "--", "munged", "--force", *arguments],
            check=True,
            timeout=20,
        )

    def run(self, *command: str, **environ: str) -> str:
        """Runs a command of SLURM; returns what it printed."""
        done = subprocess.run(
            command,
            env={**self.environ, **environ},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, condition, seconds: float) -> None:
        """Waits until `condition()` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.why()
            time.sleep(0.2)

    def why(self) -> str:
        """The ends of all logs, for a failed test."""
        logs = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("slurm-*.out"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)

    def stop(self) -> None:
        """Ends every daemon and job."""
        subprocess.run(["scancel", "-u", "root"], env=self.environ, check=False, timeout=20)
        time.sleep(0.5)
        pids = [*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid"]
        for file in [*pids, self._munge / "pid"]:
            if file.exists():
                os.kill(int(file.read_text()), signal.SIGTERM)
        time.sleep(0.5)
        shutil.rmtree(self._munge, ignore_errors=True)
