"""Flax models, each written for one chip.

BatchNorm names the axis "batch", and nothing else refers to other chips. Configs name the classes
in `mlp`, `resnet`, `resnet50`, `transformer` and `bias_adder`; `from_nnx` turns an NNX module into
a Linen module.
"""
