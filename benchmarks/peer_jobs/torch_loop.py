"""The jobs of `benchmarks/peers.py` in torch: `torch_loop.py ddp|fabric|one SETTINGS`.

`ddp` is DistributedDataParallel over gloo, started by torchrun; `fabric` is Lightning Fabric's
strategy "ddp", started by its own launcher; `one` is a single process. All three share one loop.
Batches are rows of a tensor, which is much faster than a DataLoader.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pauses import Pauses
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch_models import load_examples, make_model

kind, settings = sys.argv[1], json.loads(sys.argv[2])


def batches(x: torch.Tensor, y: torch.Tensor, rank: int) -> Iterator[tuple[Any, Any]]:
    """This process's rows of each batch."""
    generator = torch.Generator().manual_seed(0)
    size = settings["batch"]
    share = size // settings["ranks"]
    while True:
        order = torch.arange(len(x))
        if settings["shuffle"]:
            order = torch.randperm(len(x), generator=generator)
        for batch in order.view(-1, size):
            rows = batch[rank * share : (rank + 1) * share]
            yield x[rows], y[rows]


def main() -> None:
    fabric: Any = None
    if kind == "fabric":
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=settings["ranks"], strategy="ddp")
        fabric.launch()
    elif kind == "ddp":
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    x, y = load_examples(settings["examples"])
    model = make_model(settings["model"], settings["weights"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if fabric:
        model, optimizer = fabric.setup(model, optimizer)
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    pauses = Pauses(settings["address"], settings["segment"], rank)
    total, count = torch.zeros(()), 0
    for step, (inputs, targets) in enumerate(batches(x, y, rank)):
        if step == settings["steps"]:
            break
        if pauses.is_due(step):
            pauses.wait()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        if fabric:
            fabric.backward(loss)
        else:
            loss.backward()
        optimizer.step()
        total += loss.detach()
        count += 1
        if step == 0 and rank == 0:
            print("first step done", flush=True)
        if (step + 1) % settings["log_every"] == 0:
            mean = total / count
            if dist.is_initialized():
                dist.all_reduce(mean)
                mean /= settings["ranks"]
            if rank == 0:
                print(f"step {step + 1} loss {mean.item()!r}", flush=True)
            total, count = torch.zeros(()), 0
        if (step + 1) % settings["save_every"] == 0:
            save(fabric, rank, step + 1, model, optimizer)
    if dist.is_initialized():
        dist.barrier()  # who leaves while the other is still at it makes it abort, now and then
        dist.destroy_process_group()


def save(fabric: Any, rank: int, step: int, model: Any, optimizer: Any) -> None:
    """In one piece, by way of a file with another name, and three of them kept."""
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step}.pt"
    part = path.with_suffix(".part")
    if fabric:
        fabric.save(part, {"model": model, "optimizer": optimizer, "step": step})
    elif rank == 0:
        inner = model.module if kind == "ddp" else model
        state = {"model": inner.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, part)
    if rank == 0:
        os.replace(part, path)
        for old in sorted(folder.glob("*.pt"), key=lambda p: int(p.stem))[:-3]:
            old.unlink()


if __name__ == "__main__":
    main()
