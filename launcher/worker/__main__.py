"""`python -m launcher.worker`: one process of a job; the supervisor starts it."""

from launcher.worker.run import main

main()
