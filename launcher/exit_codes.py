"""What the exit code tells a shell, a scheduler or a supervisor."""

DONE = 0
FAILED = 1  # the program raised; a retry would most likely do the same
USAGE = 2  # flags, config or workdir: a person has to change something
RETRY = 42  # asked to stop and saved, or stopped from outside: start it again to go on
