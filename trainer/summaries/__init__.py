"""TensorBoard summaries besides scalars: histograms, images, confusion matrix, stragglers.

All are off by default (`config.summaries`), and none changes a number of the run. `histograms` and
`stragglers` are actions of the loop, `held_out` is called after an evaluation; only `trainer.run`
uses them.
"""
