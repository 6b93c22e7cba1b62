"""What a trained model is used for: its numbers on held-out data, its outputs, an exported program.

`evaluate` and `predict` (modules of the same names) are the public functions of the trainer; both
take the folder of a run. `evaluate.Evaluator` and `evaluate.HeldOutSums` evaluate states that are
already on the devices, as the training loop does. `trained_model.restore` reads a state and builds
the job it belongs to, as a `TrainedModel`; `export.export_model` turns that into a `jax.export`
program. Nothing here writes into the folder of a run.
"""
