"""Runs a module as `python -m` does, and says on stderr if jax was imported by its end."""

import atexit
import runpy
import sys


def tell():
    if "jax" in sys.modules:
        print("imported jax", file=sys.stderr)


atexit.register(tell)
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
