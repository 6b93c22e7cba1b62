"""Where the program runs: flags, environment, processes, mesh, exit codes."""
