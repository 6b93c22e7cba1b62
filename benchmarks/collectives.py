"""The cost of a mean over the batch axis on CPU, computed in four ways: an experiment.

    python benchmarks/collectives.py [--out=FILE.json]

On CPU, jax's collectives use gloo between processes, but not within one. The figures are
microseconds per collective, in a chain of ten that each depend on the one before, as those of
BatchNorm do:

    psum       `lax.pmean`, as it is without `launcher/worker/exchange.py`
    exchange   sums with the partner at distance 1, 2, 4, ... by `lax.ppermute`, for powers of two;
               devices may round differently, see `exchange.py`
    gather     `lax.all_gather`, then a sum on each device
    all-to-all `lax.all_to_all` of the values to every device, then a sum on each device
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from frame import parser_of, recording
from layouts import parse, report, run_layout

LAYOUTS = [(1, 2), (1, 8), (2, 1), (2, 2), (2, 4)]
SIZES = (1, 128, 1024, 80_000, 300_000)  # floats; BatchNorm of 512 features reduces 1024
CHAIN = 10
FORMS = ("psum", "exchange", "gather", "all-to-all")


def worker(settings: dict[str, Any]) -> None:
    import jax
    import jax.numpy as jnp
    from jax import lax

    count = jax.device_count()

    def exchange(x: Any) -> Any:
        distance = 1
        while distance < count:
            pairs = [(place, place ^ distance) for place in range(count)]
            x = x + lax.ppermute(x, "batch", pairs)
            distance *= 2
        return x / count

    def all_to_all(x: Any) -> Any:
        return lax.all_to_all(jnp.stack([x] * count), "batch", 0, 0).mean(0)

    forms = {
        "psum": lambda x: lax.pmean(x, "batch"),
        "exchange": exchange,
        "gather": lambda x: lax.all_gather(x, "batch").mean(0),
        "all-to-all": all_to_all,
    }
    calls: dict[tuple[int, str], Any] = {}
    for size in SIZES:
        values = {}
        for name, form in forms.items():

            def chain(x: Any, form: Any = form) -> Any:
                for _ in range(CHAIN):
                    x = form(x) * 1.001
                return x

            calls[size, name] = jax.pmap(chain, axis_name="batch")
            once = jax.pmap(form, axis_name="batch")
            x = jnp.arange(jax.local_device_count() * size).reshape(-1, size) / size
            values[name] = once(x).addressable_data(0)
        for name, value in values.items():
            assert jnp.allclose(value, values["psum"], rtol=1e-5), name
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
    for number in range(settings["rounds"] + 2):
        for (size, name), call in calls.items():
            x = jnp.ones((jax.local_device_count(), size))
            jax.block_until_ready(x)
            began = time.perf_counter()
            jax.block_until_ready(call(x))
            if number >= 2:  # the first two compile and connect
                seconds[size, name].append(time.perf_counter() - began)
    micros = {key: 1e6 * statistics.median(found) / CHAIN for key, found in seconds.items()}
    report(settings, [[size, name, value] for (size, name), value in micros.items()])


def main() -> None:
    parser = parser_of(__doc__, rounds=25)
    options = parse(parser, worker, exchanges=False)
    with recording(options.out) as record:
        rows = record["rows"] = []
        for processes, devices in LAYOUTS:
            found = run_layout(__file__, processes, devices, {"rounds": options.rounds})
            for size in SIZES:
                row = {"processes": processes, "devices of each": devices, "floats": size}
                row |= {name: value for of, name, value in found if of == size}
                rows.append(row)
                shown = "  ".join(f"{n} {row[n]:8.0f} us" for n in FORMS)
                print(f"{processes} x {devices}, {size:7} floats: {shown}", flush=True)


if __name__ == "__main__":
    main()
