"""Data that makes one rank fail at one step, for the configs of the tests."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np

from trainer.data.digits import load
from trainer.data.stream import ArraySource


class Faulty:
    """A source that fails at the n-th batch of one rank, or whose n-th example is bad."""

    def __init__(self, arrays, kind, rank, at_step, once, delay):
        self._source = ArraySource(arrays)
        self._kind, self._rank, self._at_step = kind, rank, at_step
        self._once = Path(once) if once else None
        self._delay = delay
        self._batches = 0

    def __len__(self):
        return len(self._source)

    def __getitem__(self, indices):
        if len(indices.ravel()) > 1:  # a single example is read for its shapes
            time.sleep(self._delay)
            self._batches += 1
            if self._batches == self._at_step and jax.process_index() == self._rank:
                self._fail()
        batch = self._source[indices]
        bad = np.asarray(indices) == self._at_step
        if self._kind == "nan":
            batch["x"] = np.where(bad[..., None, None, None], np.nan, batch["x"])
        if self._kind == "label":
            batch["y"] = np.where(bad, -1, batch["y"])
        return batch

    def _fail(self):
        if self._once is not None:
            if self._once.exists():
                return
            self._once.touch()
        if self._kind == "raise":
            raise ValueError("a fault of the user's code")
        if self._kind == "exit":
            os._exit(3)
        if self._kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._kind == "abort":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._kind == "stall":
            time.sleep(1000)
        if self._kind == "native":
            mutex = ctypes.create_string_buffer(64)
            for _ in range(2):  # stuck in C, with the interpreter's lock, whatever signal arrives
                ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        if self._kind == "children":
            child = subprocess.Popen(["sleep", "1000"])
            apart = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            Path(os.environ["CHILDREN"]).write_text(f"{child.pid} {apart.pid}")


def digits(kind="", rank=1, at_step=5, once=None, delay=0.0, load_secs=0.0):
    """The digits. Each batch takes `delay` seconds longer; the file `once` makes a fault unique.

    One rank takes `load_secs` longer to load them.
    """
    if load_secs and jax.process_index() == rank:
        time.sleep(load_secs)
    sources = load()
    train = Faulty(sources["train"], kind, rank, at_step, once, delay)
    return {"train": train, "eval": sources["eval"]}
