"""The script of a round, drawn from its seed before anything runs."""

from __future__ import annotations

import random
from dataclasses import dataclass

import damage

KINDS = ("kill", "term", "stop", "corrupt", "rename", "read errors", "fill")
# What a run has to wait out; only where they are asked for.
PATIENCE_KINDS = ("suspend", "late", "clock")
HOPELESS = "hopeless"  # all checkpoints are damaged, and the run has to give up
PROCESSES = 2
STEPS = 440
FAST_SECS = (0.0, 0.3, 1.0)
LAUNCHER = "launcher"


@dataclass(frozen=True)
class Moment:
    """When a disturbance happens.

    Attributes:
        kind: "time": `delay` seconds after the start, or after the previous disturbance; "step":
            `delay` seconds after the current attempt has logged `step`; "saving": the same, while a
            save is in progress.
        step: of "step" and "saving".
        delay: seconds.
    """

    kind: str
    step: int
    delay: float

    def __str__(self) -> str:
        if self.kind == "time":
            return f"after {self.delay:.2f} s"
        saving = " in a save" if self.kind == "saving" else ""
        return f"at step {self.step}{saving} + {self.delay:.2f} s"


@dataclass(frozen=True)
class Disturbance:
    """One disturbance of a run.

    Attributes:
        kind: of `KINDS` or `PATIENCE_KINDS`.
        target: the launcher or a rank; for "corrupt", one of `damage.WAYS`; for "rename", "taken"
            if another folder gets the name.
        moment: when it happens.
        seconds: its duration, if it has one; of "clock", the sum of all steps so far.
        seed: for choices when it happens, such as the file.
    """

    kind: str
    target: str
    moment: Moment
    seconds: float
    seed: float

    def __str__(self) -> str:
        return f"{self.kind} {self.target}".strip()


@dataclass(frozen=True)
class Script:
    """A round.

    Attributes:
        seed: of the series of rounds.
        number: of the round.
        kind: of its first disturbance.
        fast_secs: `config.checkpoint.fast_every_secs`.
        disturbances: in order.
    """

    seed: int
    number: int
    kind: str
    fast_secs: float
    disturbances: tuple[Disturbance, ...]


def draw(seed: int, number: int, kind: str | None = None) -> Script:
    """The script of a round.

    Args:
        seed: of the series.
        number: of the round; decides the kind of its first disturbance where `kind` is None.
        kind: of all disturbances.
    """
    rng = random.Random(f"{seed}-{number}")
    first = kind or KINDS[number % len(KINDS)]
    if first in PATIENCE_KINDS:
        return Script(seed, number, first, rng.choice(FAST_SECS), _draw_patience(rng, first))
    fast_secs = 0.0 if first == HOPELESS else rng.choice(FAST_SECS)
    count = 1 if first == HOPELESS else rng.choices((1, 2, 3), (7, 2, 1))[0]
    # Only a round that begins with "fill" has a small disk; the others fit into any round.
    others = [
        kind or rng.choice(KINDS if first == "fill" else KINDS[:-1]) for _ in range(count - 1)
    ]
    kinds = [first, *others]
    rng.shuffle(kinds)
    disturbances: list[Disturbance] = []
    for each in kinds:
        # The watchdog takes long, so at most once a round.
        no_rank = any(d.kind == "stop" and d.target != LAUNCHER for d in disturbances)
        disturbances.append(_draw_one(rng, each, no_rank=no_rank))
    return Script(seed, number, first, fast_secs, tuple(disturbances))


def _draw_one(rng: random.Random, kind: str, *, no_rank: bool) -> Disturbance:
    moment, target, seconds = _draw_moment(rng), "", 0.0
    if kind in ("kill", "term", "stop"):
        ranks = [f"rank {rank}" for rank in range(PROCESSES)]
        target = rng.choice([LAUNCHER, *ranks])
        if kind == "stop":
            seconds = rng.uniform(1, 3)
            if no_rank:
                target = LAUNCHER
            elif target != LAUNCHER and rng.random() < 0.8:
                # Outside training the watchdog waits ten times as long.
                moment = Moment("step", rng.randint(1, STEPS - 40), rng.uniform(0, 0.3))
    elif kind == "corrupt":
        target = rng.choice(list(damage.WAYS))
    elif kind == "rename":
        target = rng.choice(("taken", "free"))
        moment = Moment("step", rng.randint(1, STEPS - 40), rng.uniform(0, 0.3))
    elif kind == "read errors":
        seconds = rng.uniform(4, 8)
    elif kind == "fill":
        # On a full disk a run may refuse to start, or may fail at its last save.
        moment = Moment("step", rng.randint(1, 300), rng.uniform(0, 0.3))
        seconds = rng.uniform(1, 2)
    return Disturbance(kind, target, moment, seconds, rng.random())


def _draw_patience(rng: random.Random, kind: str) -> tuple[Disturbance, ...]:
    """One to three of a kind, in order; a rank is late only once."""
    count = 1 if kind == "late" else rng.randint(1, 3)
    drawn, ahead = [], 0
    for step in sorted(rng.sample(range(1, STEPS - 40), count)):
        target = f"rank {rng.randrange(PROCESSES)}"
        moment, seconds = Moment("step", step, rng.uniform(0, 0.3)), rng.uniform(1, 3)
        if kind == "late":
            moment, seconds = Moment("time", 0, 0.0), rng.uniform(5, 10)
        elif kind == "clock":
            # A step backward must not pass the last heartbeat of jax, that at the start.
            ahead += rng.choice((-1, 15, 90, 3600, 86400))
            target, seconds = "", float(ahead)
        drawn.append(Disturbance(kind, target, moment, seconds, rng.random()))
    return tuple(drawn)


def _draw_moment(rng: random.Random) -> Moment:
    """Covers start, restore, training, evaluation, saves and the end."""
    kind = rng.choices(("time", "step", "saving", "end"), (30, 40, 20, 10))[0]
    if kind == "time":
        return Moment("time", 0, rng.uniform(0, 4))
    if kind == "step":
        return Moment("step", rng.randint(1, STEPS), rng.uniform(0, 0.3))
    if kind == "saving":
        return Moment("saving", rng.randint(1, STEPS - 40), rng.uniform(0, 0.05))
    return Moment("step", STEPS, rng.uniform(0, 0.5))
