"""The cost of the option of XLA that keeps NaN on CPU: the step of ResNet-8 with and without it.

    python benchmarks/nan_option.py [--rounds=25] [--devices=1] [--out=FILE.json]

One process compiles the step twice (trainer/xla_flags.py says why) and takes turns with the two
programs. Processor time is less sensitive to other programs on the machine than wall time.
"""

from __future__ import annotations

import os
import time
from statistics import median
from typing import Any

from frame import fake_devices, parser_of, recording, shown
from scaling import config_of

# As XLA_FLAGS without the option, and with it: a minus is not accepted here.
_KEEP_NAN = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
    )
}
_STEPS = 10  # a turn


def compare(rounds: int) -> dict[str, Any]:
    import jax

    from trainer.config.settings import check
    from trainer.lift.lift import make_lift
    from trainer.step.init import init_state
    from trainer.step.job import build_job
    from trainer.step.task import Recipe
    from trainer.step.update import make_update_step, stack_metrics

    settings = check(config_of("resnet", lift="shard_map"))
    mesh = jax.make_mesh((len(jax.devices()),), ("batch",))  # without one, podlift sets the option
    job, lift = build_job(settings), make_lift(settings.lift, mesh)
    batch = job.stream.batch_at(0, lift.rows(settings.global_batch_size))
    on_devices = lift.put_batch(batch)
    step = lift(stack_metrics(make_update_step(job.task, Recipe(flat=True))))
    found: dict[str, Any] = {}
    states, programs = {}, {}
    for name, options in (("default", {}), ("keeps NaN", _KEEP_NAN)):
        states[name] = lift.put_state(init_state(job.task, 0, batch["x"][0]))
        lowered = step.lower(states[name], on_devices)
        programs[name] = lowered.compile(compiler_options=options)
        found[f"fusions by YNNPACK, {name}"] = programs[name].as_text().count("__ynn_fusion")
    wall: dict[str, list[float]] = {name: [] for name in programs}
    processor: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 2):
        for name, program in programs.items():
            began = time.perf_counter(), time.process_time()
            for _ in range(_STEPS):
                states[name], _ = program(states[name], on_devices)
            jax.block_until_ready(states[name])
            wall[name].append((time.perf_counter() - began[0]) / _STEPS)
            processor[name].append((time.process_time() - began[1]) / _STEPS)
    for kind, times in (("wall", wall), ("processor", processor)):
        kept = {name: values[2:] for name, values in times.items()}  # two rounds warm up
        found |= {f"{kind} ms/step, {name}": 1000 * median(v) for name, v in kept.items()}
        pairs = zip(kept["keeps NaN"], kept["default"], strict=True)
        found[f"{kind}, keeps NaN / default"] = median(a / b for a, b in pairs)
    return found


def main() -> None:
    parser = parser_of(__doc__, rounds=25)
    parser.add_argument("--devices", type=int, default=1, help="default: 1")
    options = parser.parse_args()
    fake_devices(options.devices)
    # `fake_devices` adds the option for both programs.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    with recording(options.out, devices=options.devices) as record:
        record |= compare(options.rounds)
        print(shown(record))


if __name__ == "__main__":
    main()
