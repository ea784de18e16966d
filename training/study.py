"""The map of the study in results/: settings from one round per step to one per 120 steps.

Their loss gaps are in results/shakespeare/summary.json, which scripts/shakespeare/figures.py writes
from the logs of the study.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from omegaconf import DictConfig

from training.schedule import cooldown_steps

SUMMARY = Path(__file__).resolve().parents[1] / "results" / "shakespeare" / "summary.json"
WORKERS = (2, 4, 8)
DENSE = "compressor@w2s=quantize w2s.values=normal2"
BACK = "compressor@s2w=quantize s2w.values=normal2"
LOCAL = "optimizer=local norm.hidden.radius=2"
SIGNS = "optimizer=local_signs norm.hidden.radius=2"
RADII = "norm.hidden.radius=2 norm.embedding.radius=60"
LONG, SHORT = 120, 60  # steps per round, before the lr falls and after


@cache
def loss_gaps() -> dict[str, float]:
    """The loss gap in percent by the name of the study's setting.

    That is the final test loss over that of as many workers without compression.
    """
    return json.loads(SUMMARY.read_text())["loss_gap_percent"]


@dataclass(frozen=True)
class Setting:
    """A setting in words and as overrides, in which SHORTER stands for rounds that get shorter."""

    name: str
    words: str
    template: str

    def name_in_study(self, workers: int) -> str:
        """What the study calls it with so many workers; for two, 2 bits go without saying."""
        return (
            self.name.removesuffix("-dense2") if workers == 2 else f"workers/{workers}-{self.name}"
        )

    @property
    def over(self) -> dict[int, float]:
        """The loss gap in percent by number of workers, for those that have run.

        Two workers have run all settings except those that help eight: messages of 2 bits from the
        servers, and more outer momentum.
        """
        names = {workers: self.name_in_study(workers) for workers in WORKERS}
        return {
            workers: loss_gaps()[name] for workers, name in names.items() if name in loss_gaps()
        }

    def overrides(self, config: DictConfig) -> tuple[str, ...]:
        """The overrides for a run of the configuration's length and schedule."""
        return tuple(self.template.replace("SHORTER", _shorter(config)).split())


def _shorter(config: DictConfig) -> str:
    """Rounds of LONG steps while the lr is full, and of SHORT steps afterwards."""
    full = round(config.steps - cooldown_steps(config)) // LONG * LONG
    return f"{{0:{LONG},{full}:{SHORT}}}" if full else str(SHORT)


MAP = (
    Setting(
        "identity",
        "uncompressed, every step",
        f"compressor@w2s=identity {RADII} optimizer.momentum=0.8",
    ),
    Setting(
        "served6",
        "quantized rank 6 %, momentum at servers, every step",
        "compressor@w2s=quantized_rank w2s.fraction=0.06 "
        "+compressor@norm.embedding.w2s=quantized_rank norm.embedding.w2s.fraction=0.2 "
        "optimizer.feedback=ef14 optimizer.momentum=0 "
        f"optimizer.server_momentum=0.7 optimizer.error_decay=0.92 {RADII}",
    ),
    *(
        Setting(
            f"local{every}-signs",
            f"signs of all entries, every {every} steps",
            f"{SIGNS} optimizer.sync_every={every}",
        )
        for every in (4, 10, 30, 60)
    ),
    Setting(
        f"local{LONG}-{SHORT}-signs",
        f"signs of all entries, every {LONG}, then {SHORT} steps",
        f"{SIGNS} optimizer.sync_every=SHORTER",
    ),
    *(
        Setting(
            f"local{every}-dense2",
            f"2 bits per entry, every {every} steps",
            f"{LOCAL} optimizer.sync_every={every} {DENSE}",
        )
        for every in (10, 30, 60)
    ),
    *(
        Setting(
            f"local{every}-back",
            f"signs of all entries, back in 2 bits, every {every} steps",
            f"{SIGNS} optimizer.sync_every={every} {BACK}",
        )
        for every in (2, 4)
    ),
    Setting(
        "local10-back6",
        "signs of all entries, back in 2 bits, outer momentum 0.6, every 10 steps",
        f"{SIGNS} optimizer.sync_every=10 optimizer.outer_momentum=0.6 {BACK}",
    ),
    *(
        Setting(
            f"local{every}-outer6",
            f"signs of all entries, outer momentum 0.6, every {every} steps",
            f"{SIGNS} optimizer.sync_every={every} optimizer.outer_momentum=0.6",
        )
        for every in (10, 30)
    ),
)
