"""What a plan is asked for. Nothing here imports jax."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.planning.topology import Topology
from trainer.config.settings import Settings


@dataclass(frozen=True)
class PlanRequest:
    """One config to plan on one topology.

    Attributes:
        label: distinguishes this plan from the others of a comparison.
        config_name: the value of --config.
        settings: the checked config.
        topology: the devices to plan for.
    """

    label: str
    config_name: str
    settings: Settings
    topology: Topology


@dataclass(frozen=True)
class PlanOptions:
    """Options that apply to every plan of a command.

    Attributes:
        batch: examples per device; "auto" for the most that fit; None for the config's.
        example: the shapes of one example, which replace the data; None loads the data.
        sync_bn: whether the prediction includes the collectives of batch normalisation.
        quick: whether the compiler saves time.
    """

    batch: int | str | None
    example: str | None
    sync_bn: bool
    quick: bool
