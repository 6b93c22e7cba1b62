"""A disk whose saves fail or hang as a test wants, and writers that save to it."""

from __future__ import annotations

import contextlib
import queue
import threading

from messages import LONG

from trainer.checkpoints.writer import Writer
from trainer.errors import SavesFailed


class Disk:
    """Does saves, or fails to, as a test wants it.

    Attributes:
        fails: steps that fail, with how often (-1: always).
        done: (folder, step) of those that were done.
        tried: the same of all tries.
        is_open: while not set, a save hangs before it is done or fails.
    """

    def __init__(self, fails=None):
        self.fails = dict(fails or {})
        self.done, self.tried = [], []
        self.is_open = threading.Event()
        self.is_open.set()
        self.begun = queue.Queue()

    def __call__(self, save):
        what = (save.folder.path.name, save.step)
        self.tried.append(what)
        self.begun.put(what)
        assert self.is_open.wait(LONG)
        left = self.fails.get(save.step, 0)
        if left:
            self.fails[save.step] = left - 1
            raise RuntimeError(f"try {len(self.tried)} of step {save.step} failed")
        self.done.append(what)

    def hang(self):
        self.is_open.clear()

    def wait_for(self, step):
        while self.begun.get(timeout=LONG)[1] != step:
            pass


@contextlib.contextmanager
def writers():
    """Makes writers, and ends their threads."""
    made = []

    def make_writer(disk, max_failures=3, pauses=(0.0,), patience=0.0):
        made.append((Writer(max_failures, disk, pauses, patience), disk))
        return made[-1][0]

    yield make_writer
    for writer, disk in made:
        disk.is_open.set()
        writer.close()
        assert not is_alive(writer)


def is_alive(writer):
    return writer._thread is not None and writer._thread.is_alive()


def finisher_of(writer):
    """A thread that will wait for the end of all saves, and what was raised there."""
    errors = []

    def finish():
        try:
            writer.finish()
        except SavesFailed as error:
            errors.append(error)

    return threading.Thread(target=finish), errors


def wait_until(writer, is_so):
    with writer._changed:
        assert writer._changed.wait_for(is_so, LONG)
