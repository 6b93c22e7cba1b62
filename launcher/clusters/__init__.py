"""The place of this process in a job that a scheduler started: one module a scheduler.

`detect.detect` reads it from environment variables alone, so that a file can replay what happens on
a cluster, and returns a `placement.Placement`; `detect.by_hand` makes one from flags. jax gets the
result and detects nothing itself: it guesses wrong too often, and then hangs before it can show
what it guessed. `gce_metadata.read_gce_metadata` adds what only a metadata server knows; `read`
parses addresses and counts visible accelerators. A new scheduler is a module that implements
`placement.Cluster`, and an entry in `detect.CLUSTERS`.
"""
