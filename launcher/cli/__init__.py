"""`python -m launcher eval`, `predict` and `export`: what is done with a run's saved states.

Each is one process on all of its devices, takes no lock and writes nothing into the run's folder,
so the run may be training meanwhile. `request` is what they share: from arguments to a model.
"""
