"""Records TPU topologies for `test_mesh.py`: `python tests/record_topologies.py`.

Needs jax[tpu] but no TPU: libtpu describes topologies without one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

# Without these, libtpu warns that it finds no TPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"

from jax.experimental import topologies

FOLDER = Path(__file__).parent / "recorded"
TOPOLOGIES = {
    "v5e-4x4": ("v5e:4x4", {}),
    "v5e-16x16": ("v5e:16x16", {}),
    "v5p-4x4x4": ("v5p:4x4x4", {}),
    "v5e-4x4-2slices": ("v5e:4x4", {"num_slices": 2}),
}
# The devices of a single slice have no slice_index.
FIELDS = ("id", "process_index", "coords", "core_on_chip", "slice_index")


def describe(topology, **options):
    """The devices of a topology: one list per field, in the order of the devices."""
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **options
    ).devices
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        **{
            field: [getattr(device, field) for device in devices]
            for field in FIELDS
            if hasattr(devices[0], field)
        },
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, (topology, options) in TOPOLOGIES.items():
        text = json.dumps(describe(topology, **options), separators=(",", ":"))
        # One line per field.
        (FOLDER / f"topology-{name}.json").write_text(text.replace(',"', ',\n"') + "\n")
