"""Trains without a launcher, on a mesh in which the devices of two processes alternate.

python interleaved.py PORT RANK WORKDIR
"""

import sys

import digits_config
import jax
import numpy as np

import trainer

port, rank, workdir = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank), cluster_detection_method="deactivate")
a, b, c, d = jax.devices()
config = digits_config.get_config()
config.num_steps = 5
config.lift = "shard_map"
trainer.train(config, workdir, jax.sharding.Mesh(np.array([c, a, d, b]), ("batch",)))
