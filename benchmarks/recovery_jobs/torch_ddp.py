"""The same job for torchrun: `torchrun ... torch_ddp.py SETTINGS`; DDP over gloo on the CPU."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from fault import strike
from torch import nn
from torch.nn.parallel import DistributedDataParallel

settings = json.loads(sys.argv[1])


def newest(folder: Path) -> Path | None:
    found = folder.glob("step-*.pt")
    return max(found, key=lambda path: int(path.stem.partition("-")[2]), default=None)


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Saves atomically: writes a temporary file and renames it."""
    path = folder / f"step-{step}.pt"
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def main() -> None:
    timeout = datetime.timedelta(seconds=settings["timeout"]) if settings["timeout"] else None
    dist.init_process_group("gloo", timeout=timeout)
    rank = dist.get_rank()
    torch.manual_seed(0)
    x = torch.randn(settings["examples"], 64)
    y = torch.randint(0, 10, (settings["examples"],))
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    model = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    folder, step = Path(settings["folder"]), 0
    folder.mkdir(exist_ok=True)
    if (path := newest(folder)) is not None:
        state = torch.load(path, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        if rank == 0:
            print(f"restored step {step}", flush=True)
    first = True
    while step < settings["steps"]:
        rows = torch.randint(0, len(x), (32,))
        time.sleep(settings["delay"])
        if rank == 1 and step == settings["after"]:
            strike(settings["kind"], settings["mark"])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        step += 1
        if rank == 0:
            if first:
                first = False
                print("first step done", flush=True)
            if step % 10 == 0:
                print(f"step {step} loss {loss.item()}", flush=True)
            if step % settings["every"] == 0:
                save(folder, step, model.module, optimizer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
