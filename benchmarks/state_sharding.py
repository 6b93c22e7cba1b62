"""The cost of a step with the state sharded over the devices, against a replicated state.

    python benchmarks/state_sharding.py [--width=512] [--batch=1024] [--devices=8] [--rounds=30]
        [--reduce=flat]

One step of an MLP with Adam, whose state is twice the params, in one process on fake CPU devices.
The three kinds of state sharding take turns. Bytes are per device.
"""

from __future__ import annotations

import os
from typing import Any

from frame import fake_devices, parser_of, write_and_print

KINDS = ("replicated", "zero1", "fsdp")
STEPS = 10  # a turn


def main() -> None:
    parser = parser_of(__doc__, rounds=30)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--reduce", default="flat", choices=("flat", "leaves"))
    options = parser.parse_args()
    fake_devices(options.devices)
    flat = options.reduce == "flat"
    result = measure(options.width, options.batch, options.devices, options.rounds, flat)
    write_and_print(result, options.out)


def measure(width: int, batch: int, devices: int, rounds: int, flat: bool) -> dict[str, Any]:
    import jax
    import numpy as np
    import optax
    from turns import Turns

    from trainer.lift.lift import make_lift
    from trainer.lift.update import make_sharded_step
    from trainer.losses import softmax_cross_entropy
    from trainer.models.mlp import MLP
    from trainer.step.init import init_state
    from trainer.step.task import Recipe, Task
    from trainer.step.update import make_update_step

    random = np.random.default_rng(0)
    examples = {
        "x": random.normal(size=(batch, width)).astype(np.float32),
        "y": random.integers(10, size=batch).astype(np.int32),
    }
    model = MLP(hidden_size=width, out_size=10)
    task = Task(model, softmax_cross_entropy, optax.adam(1e-3), 1e-3)
    recipe = Recipe(flat=flat)
    held: dict[str, int] = {}
    temporary: dict[str, int] = {}

    def init():
        return init_state(task, 0, examples["x"][0], recipe)

    def contestant(kind):
        def compete(turn):
            lift = make_lift("shard_map", state_sharding=kind)
            shapes = jax.eval_shape(init)
            if lift.sharded:
                step = lift.compile(make_sharded_step(task, recipe, lift, shapes), shapes)
            else:
                step = lift(make_update_step(task, recipe))
            state = lift.make_state(jax.jit(init))
            held[kind] = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state))
            on_devices = lift.put_batch(examples)
            memory = step.lower(state, on_devices).compile().memory_analysis()
            temporary[kind] = memory.temp_size_in_bytes
            ended = False
            while not ended:
                for _ in range(STEPS):
                    state, metrics = step(state, on_devices)
                jax.block_until_ready((state, metrics))
                ended = turn()

        return compete

    turns = Turns(rounds)
    turns.run({kind: contestant(kind) for kind in KINDS})
    return {
        "jax": jax.__version__,
        "devices": devices,
        "width": width,
        "global_batch_size": batch,
        "reduce": "flat" if flat else "leaves",
        "state_bytes_a_device": held,
        "temporary_bytes_a_device": temporary,
        "ms_a_step": {kind: 1000 * turns.median(kind) / STEPS for kind in KINDS},
        "ratio_to_replicated": {kind: turns.ratio(kind, "replicated") for kind in KINDS},
        "load_average": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
