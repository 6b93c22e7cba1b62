"""The place of this process in a job that something else started.

`detect.detect` reads it from environment variables alone, so that a file can replay what happens on
a cluster, and returns a `placement.Placement`; `detect.by_hand` makes one from flags. jax gets the
result and detects nothing itself: it guesses wrong too often, and then hangs before it can show
what it guessed. `detect.with_machine` adds what no variable says: a metadata server, the process
manager of MPI, the host files of batch systems. `read` parses addresses and counts visible
accelerators.

A launcher that gives rank, size and address in a variable each is a row of names in `launchers`;
any other is a module that implements `placement.Cluster`. Both need an entry in `detect.CLUSTERS`.
"""
