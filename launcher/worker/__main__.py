"""`python -m launcher.worker`: one process of a job, started by its launcher."""

from launcher.worker.run import main

main()
