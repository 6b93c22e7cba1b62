"""The training state and its leaves, on whatever devices they are.

Other rooms use `train_state.TrainState`, `leaves` (leaves by name), `subtrees` (parts of a model by
path), `partition` (which leaves are sharded, along which dimension), `freezing` and `checksums`.
"""
