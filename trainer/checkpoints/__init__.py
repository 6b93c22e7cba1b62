"""Checkpoints: states that outlive their process, on disk with Orbax and in the memory of a host.

The training loop uses `saver.Saver`, which decides what is saved and restored; below it,
`writer.Writer` saves in a thread, `restorer.Restorer` finds the state to resume from,
`folder.CheckpointFolder` keeps `<folder>/<step>/` intact through kills and full disks,
`manifest` finds damage, `arrays` reads and writes Orbax's format and
`in_memory.InMemoryCheckpoints` keeps the newest state in `/dev/shm`. Others may use `load.load`
and `load.read_saved` (read a state without a trainer), `init_from.initialise_from` (begin with the
parameters of another run) and `differences` (compare a saved state with the expected one).
"""
