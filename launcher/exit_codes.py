"""Exit codes, for a shell, a scheduler or the supervisor."""

DONE = 0
FAILED = 1  # the program raised; a retry would most likely fail too
USAGE = 2  # wrong flags, config or workdir: the user has to change something
RETRY = 42  # asked to stop and saved, or ended from outside: the same command resumes
