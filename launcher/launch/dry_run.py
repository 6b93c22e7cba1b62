"""A launch as text: what `--dry_run` prints, and the line about a detected cluster."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.clusters.placement import Placement
from launcher.launch import environment
from launcher.launch.spec import LaunchSpec
from launcher.launch.workers import count_gpus
from trainer.workdir.environment import redact


def describe_placement(placement: Placement) -> str:
    """One line: the place in the cluster, and the variables that it was read from."""
    source = f", from {', '.join(placement.variables)}" if placement.variables else ""
    restarts = f", restart {placement.attempt}" if placement.attempt else ""
    return (
        f"{placement.cluster}: process {placement.process_id} of {placement.num_processes}, rank 0 "
        f"at {placement.host}:{placement.port}{restarts}{source}"
    )


def describe_launch(spec: LaunchSpec, environ: Mapping[str, str]) -> str:
    """A table of the processes, their environment, where they rendezvous, and the mesh.

    Args:
        spec: what to run.
        environ: the launcher's environment.
    """
    settings, placement = spec.settings, spec.placement
    if placement is None:
        rows = [("cluster", "none: this machine")]
        if spec.num_processes > 1:
            rows.append(("coordinator", "127.0.0.1, a free port at each attempt"))
    else:
        rows = [
            ("cluster", describe_placement(placement)),
            ("rendezvous", f"{placement.host}:{placement.port}, where rank 0 names a free port"),
        ]
    count = spec.num_processes
    batch = settings.global_batch_size
    rows.append(("processes", f"{count}, {len(spec.workers)} of them started here"))
    per_process = _devices_per_process(spec, environ)
    if per_process is None:
        devices = "all devices that jax finds"
        share = f"{batch // count} a process" if count > 1 else "divided by the devices"
    else:
        devices = f"{per_process * count} devices"
        devices += f" ({per_process} a process)" if count > 1 else ""
        share = f"{batch // count} a process, {batch // (count * per_process)} a device"
    rows += [
        ("mesh", f'{devices} on one axis, "batch"; lift {settings.lift}'),
        ("global batch", f"{batch}: {share}"),
        ("workdir", spec.workdir + " (resumes from its newest checkpoint)" * spec.folder.exists),
        ("supervised", "yes" if spec.supervised else "no: runs in place"),
    ]
    for worker in spec.workers:
        ids = worker.local_device_ids
        shown = [f"{name}={redact(value)}" for name, value in sorted(worker.environ.items())]
        shown += [] if ids is None else [f"local devices {','.join(map(str, ids))}"]
        rows.append((f"rank {worker.rank}", "  ".join(shown) or "the environment as it is"))
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:{width}}  {text}\n" for name, text in rows)


def _devices_per_process(spec: LaunchSpec, environ: Mapping[str, str]) -> int | None:
    """The number of devices of each process; None where only jax can tell."""
    if spec.settings.devices_per_process is not None:
        return spec.settings.devices_per_process
    worker = spec.workers[0]
    environ = {**environ, **worker.environ}
    fake = environment.fake_device_count(environ)
    if fake:
        return fake
    if worker.local_device_ids is not None:
        return len(worker.local_device_ids)
    return count_gpus(environ) or None
