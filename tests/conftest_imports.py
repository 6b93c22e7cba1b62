"""Runs a module as `python -m` does, and prints to stderr at exit if it imported jax."""

import atexit
import runpy
import sys


def report():
    if "jax" in sys.modules:
        print("imported jax", file=sys.stderr)


atexit.register(report)
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
