"""The commands of `python -m launcher`: one module each, listed in the table `commands.COMMANDS`.

`run_command` is the frame around a command (--help, errors, exit codes). `finished_run` holds what
`eval`, `predict` and `export` share: each works on saved states in one process, takes no lock and
writes nothing into the run's folder, so the run may be training.
"""
