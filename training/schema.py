"""The keys of configs/config.yaml, their types, and the values of keys that are chosen by name."""

from dataclasses import dataclass
from typing import Any

from training.gradients import COMPILE, PRECISIONS
from training.links import Plan
from training.membership import MembershipConfig
from training.schedule import SHAPES, Schedule
from training.workers import TRANSPORTS

ALLOWED = {  # the values of keys that are chosen by name
    "resume": ("none", "auto", "elastic"),
    "transport": TRANSPORTS,
    "precision": PRECISIONS,
    "compile": COMPILE,
    "schedule.shape": SHAPES,
    "wandb.mode": ("disabled", "offline", "online"),
}
KINDS = {
    int: "a whole number",
    float: "a number",
    float | None: "a number or null",
    bool: "true or false",
    str: "text",
}


@dataclass
class Batch:
    global_size: int
    micro_size: int


@dataclass
class Eval:
    every: int
    tokens: int


@dataclass
class Checkpoint:
    every: int
    keep: int
    asynchronous: bool


@dataclass
class Data:
    name: str
    vocab_size: int
    train: str
    train_shards: int
    test: str
    rebuild: str


@dataclass
class Wandb:
    mode: str
    project: str


@dataclass
class Config:
    """The types of configs/config.yaml. `Any` nodes name a class, which checks its own values."""

    model: Any
    optimizer: Any
    norm: Any
    w2s: Any
    s2w: Any
    ranks_per_worker: int
    fsdp: bool
    transport: str
    dry_run: bool
    plan: Plan
    seed: int
    steps: int
    log_every: int
    diagnostics_every: int
    check_every: int
    precision: str
    compile: Any
    label: str | None
    runs: str
    directory: str | None
    resume: str
    fail_fast: bool
    membership: MembershipConfig
    data: Data
    batch: Batch
    clip_grad_norm: float | None
    schedule: Schedule
    eval: Eval
    checkpoint: Checkpoint
    wandb: Wandb
