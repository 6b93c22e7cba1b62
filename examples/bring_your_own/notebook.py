"""The cells of a notebook: train a model, then use its state.

With fake devices: XLA_FLAGS=--xla_force_host_platform_device_count=4 python notebook.py
"""

import sys

import jax.numpy as jnp
from config import get_config
from spirals.model import SpiralNet

import trainer

config = get_config()
config.num_epochs = 30
workdir = sys.argv[1] if len(sys.argv) > 1 else "runs/notebook"
state, metrics = trainer.train(config, workdir)

print(f"held-out accuracy {metrics['eval/accuracy']:.3f}")
variables = {"params": state.params, **state.model_state}
print("scores", SpiralNet().apply(variables, jnp.array([[0.5, 0.1], [-0.3, 0.2]])))
