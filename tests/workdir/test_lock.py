"""One job at a time trains in a folder, and whoever comes second learns who was first."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
from conftest import ROOT
from disk_faults import tree
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trainer.errors import UserError
from trainer.workdir import lock


class Process:
    """`trainer.workdir.lock` as another process has it: an flock belongs to an open file."""

    def __init__(self, pid):
        spec = importlib.util.spec_from_file_location("lock_of_another", lock.__file__)
        self.lock = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.lock)
        self.pid = pid
        self.lock.os = types.SimpleNamespace(getpid=lambda: pid, fspath=os.fspath)

    def kill(self):
        """What the kernel does for a process that ends without a word."""
        for handle in self.lock._held.values():
            if handle is not None:
                os.close(os.dup(handle.fileno()))
                handle.detach().detach().close()
        self.lock._held.clear()


def raised_by(call, *arguments):
    """The text of the UserError, or ""."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return ""


def pid_in(refusal):
    return int(re.match(r"process (\d+) on ", refusal).group(1))


@pytest.fixture
def processes():
    made = [Process(pid) for pid in (101, 102, 103)]
    yield made
    for process in made:
        process.kill()


class Holders(RuleBasedStateMachine):
    """Several processes, two folders; who holds what is known beforehand."""

    def __init__(self):
        super().__init__()
        self.root = tempfile.TemporaryDirectory()
        self.folders = [epath.Path(self.root.name) / name for name in ("a", "b")]
        for folder in self.folders:
            folder.mkdir()
        self.processes = [Process(pid) for pid in (101, 102, 103)]
        self.holders = {0: None, 1: None}

    def teardown(self):
        for process in self.processes:
            process.kill()
        self.root.cleanup()

    who = st.integers(0, 2)
    where = st.integers(0, 1)

    @rule(who=who, where=where)
    def take(self, who, where):
        refusal = raised_by(self.processes[who].lock.acquire, self.folders[where])
        if self.holders[where] in (None, who):
            assert not refusal
            self.holders[where] = who
        else:
            assert pid_in(refusal) == self.processes[self.holders[where]].pid

    @rule(who=who, where=where)
    def release(self, who, where):
        self.processes[who].lock.release(self.folders[where])
        if self.holders[where] == who:
            self.holders[where] = None

    @rule(who=who)
    def kill(self, who):
        pid = self.processes[who].pid
        self.processes[who].kill()
        self.processes[who] = Process(pid + 100)
        self.holders = {key: None if held == who else held for key, held in self.holders.items()}

    @rule(where=where, content=st.binary(max_size=40))
    def damage(self, where, content):
        """By somebody else, once its holder is gone."""
        if self.holders[where] is None:
            (self.folders[where] / lock.NAME).write_bytes(content)

    @rule(who=who, where=where)
    def check_free(self, who, where):
        before = tree(self.root.name)
        refusal = raised_by(self.processes[who].lock.check_free, self.folders[where])
        assert tree(self.root.name) == before
        assert bool(refusal) == (self.holders[where] not in (None, who))
        if refusal:
            assert pid_in(refusal) == self.processes[self.holders[where]].pid

    @invariant()
    def only_the_holder_knows_it(self):
        for where, holder in self.holders.items():
            taken = [p.lock.is_held(self.folders[where]) for p in self.processes]
            assert taken == [who == holder for who in range(3)]


TestHolders = pytest.mark.wide(Holders.TestCase)
TestHolders.settings = settings(max_examples=40, stateful_step_count=20)


def test_a_refusal_names_host_process_and_time(processes, tmp_path):
    first, second, _ = processes
    first.lock.acquire(epath.Path(tmp_path))
    record = json.loads((tmp_path / lock.NAME).read_text())
    assert record["host"] == platform.node()
    assert record["pid"] == 101
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", record["since"])
    for call in (second.lock.acquire, second.lock.check_free):
        with pytest.raises(UserError) as refused:
            call(epath.Path(tmp_path))
        since = record["since"]
        assert refused.value.message == (
            f"process 101 on {platform.node()} is already training in {tmp_path} since {since}"
        )
        assert "kill 101" in refused.value.hint


@pytest.mark.wide
@given(st.binary())
@example(b"")
@example(b"\xff\xfe\x00")
@example(b'{"host": "elsewhere", "pid": 1, "since": "then"}\n')
@example(b"[" * 100_000)
def test_whatever_a_dead_process_left_is_taken_over(content):
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / lock.NAME
        place.write_bytes(content)
        process, other = Process(101), Process(102)
        try:
            assert not raised_by(process.lock.check_free, epath.Path(name))
            assert place.read_bytes() == content
            process.lock.acquire(epath.Path(name))
            assert json.loads(place.read_text())["pid"] == 101
            assert pid_in(raised_by(other.lock.acquire, epath.Path(name))) == 101
        finally:
            process.kill()
            other.kill()


@pytest.mark.wide
@given(st.binary())
@example(b"")
@example(b"{}")
@example(b"[]")
@example(b"null")
@example(b'"text"')
@example(b'{"host": "h", "pid": "no number", "since": ""}')
@example(b'{"host": "h", "pid": 1}')
@example(b'{"host": "h", "pid": Infinity, "since": ""}')
@example(b'{"host": "h", "pid": NaN, "since": ""}')
@example(b"[" * 100_000)
@example(b"9" * 5000)
def test_a_record_nobody_can_read_is_no_reason_to_let_a_second_in(content):
    """As where the disk was full when it was written."""
    with tempfile.TemporaryDirectory() as name:
        process, other = Process(101), Process(102)
        try:
            process.lock.acquire(epath.Path(name))
            (Path(name) / lock.NAME).write_bytes(content)
            for call in (other.lock.check_free, other.lock.acquire):
                assert "already training in" in raised_by(call, epath.Path(name))
            assert (Path(name) / lock.NAME).read_bytes() == content
            process.lock.release(epath.Path(name))
            other.lock.acquire(epath.Path(name))
        finally:
            process.kill()
            other.kill()


def test_one_folder_by_several_names(processes, tmp_path, monkeypatch):
    first, second, _ = processes
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    first.lock.acquire(epath.Path("run"))
    first.lock.acquire(epath.Path(tmp_path / "run"))
    assert first.lock.is_held("./run/")
    for name in ("run", "link", tmp_path / "x/../run", f"{tmp_path}/run/"):
        assert pid_in(raised_by(second.lock.acquire, epath.Path(name))) == 101
        assert pid_in(raised_by(second.lock.check_free, epath.Path(name))) == 101
    monkeypatch.chdir("/")
    first.lock.release(epath.Path(tmp_path / "run"))
    assert (tmp_path / "run" / lock.NAME).read_text() == ""
    second.lock.acquire(epath.Path(tmp_path / "link"))


def test_looking_makes_no_file(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        lock.check_free(epath.Path(folder))
    lock.release(epath.Path(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_two_may_look_at_the_same_time(processes, tmp_path):
    first, second, _ = processes
    (tmp_path / lock.NAME).write_text("")
    with (tmp_path / lock.NAME).open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
        first.lock.check_free(epath.Path(tmp_path))
        second.lock.check_free(epath.Path(tmp_path))


def test_remote_folders_are_kept_apart_on_one_machine(processes, tmp_path):
    first, second, _ = processes
    run, other = epath.Path("gs://bucket/run"), epath.Path("gs://bucket/other")
    first.lock.acquire(run, str(tmp_path))
    second.lock.acquire(other, str(tmp_path))
    assert pid_in(raised_by(second.lock.acquire, run, str(tmp_path))) == 101
    assert pid_in(raised_by(second.lock.check_free, run, str(tmp_path))) == 101
    first.lock.release(run)
    second.lock.acquire(run, str(tmp_path))


@pytest.fixture
def no_locks(monkeypatch, tmp_path):
    """A file system that knows no locks, at `tmp_path / "run"`."""
    real = fcntl.flock

    def flock(handle, operation):
        if Path(handle.name).parent == tmp_path / "run":
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "run").mkdir()
    return epath.Path(tmp_path / "run"), str(tmp_path / "local")


def test_without_locks_two_on_one_machine_are_kept_apart(processes, no_locks):
    first, second, _ = processes
    folder, local = no_locks
    first.lock.acquire(folder, local)
    assert pid_in(raised_by(second.lock.acquire, folder, local)) == 101
    first.kill()
    second.lock.acquire(folder, local)


def test_without_locks_looking_agrees_with_taking(processes, no_locks):
    first, second, _ = processes
    folder, local = no_locks
    first.lock.acquire(folder, local)
    assert pid_in(raised_by(second.lock.check_free, folder, local)) == 101
    first.lock.release(folder)
    assert not raised_by(second.lock.check_free, folder, local)


# Real processes

HOLD = """
import sys
from etils import epath
from trainer.workdir import lock
lock.acquire(epath.Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


def hold(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "taken\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_held_is_free_at_once(tmp_path, number):
    holder = hold(tmp_path)
    try:
        for call in (lock.acquire, lock.check_free):
            with pytest.raises(UserError, match=f"^process {holder.pid} on .* since "):
                call(epath.Path(tmp_path))
        assert not lock.is_held(tmp_path)
        holder.send_signal(number)
        assert holder.wait() == -number
        assert str(holder.pid) in (tmp_path / lock.NAME).read_text()
        lock.check_free(epath.Path(tmp_path))
        lock.acquire(epath.Path(tmp_path))
        assert lock.is_held(tmp_path)
    finally:
        lock.release(epath.Path(tmp_path))
        holder.kill()
        holder.communicate()


def test_a_started_process_does_not_keep_the_lock(processes, tmp_path):
    """What a job starts, such as a compiler, may outlive it."""
    first, second, _ = processes
    first.lock.acquire(epath.Path(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        first.kill()
        second.lock.acquire(epath.Path(tmp_path))
    finally:
        child.communicate(b"\n")
