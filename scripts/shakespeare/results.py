"""What the logs of results/shakespeare say: final losses, the target, and what it takes to it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from scripts.shakespeare.conditions import WORKER_SETTINGS
from scripts.shakespeare.settings import MOMENTUM_SETTINGS, SEEDS, SETTINGS, Setting
from training.records import BYTES_PER_PARAMETER, Log, read_log

RESULTS = Path(__file__).resolve().parents[2] / "results" / "shakespeare"
TARGET_SHARE = 0.75  # of the uncompressed run's tokens
OTHERS = (  # families not ours
    *("Muon", "AdamW", "Muon + PowerSGD", "Muon + GreedyLore", "Dion", "Dion float32", "DeMo"),
)
LOCAL = ("local steps",)  # ours, of rounds of several steps
PEERS = ("DiLoCo", "MuLoCo", "SparseLoCo")  # not ours, likewise
NETWORK_LOG, REPLAY_LOG = "network.jsonl", "replay.jsonl"
UNLIMITED = "no limit, no delay"  # of links
DIFFERENCES_LOG, CHANGES_LOG = "differences.jsonl", "changes.jsonl"
SIGN_REPLAY_LOG = "sign_replay.jsonl"
# The first runs of signs asked for the largest 30 %. With their places these are more bytes than
# the signs of all entries, which were therefore sent.
ASKED_FOR, SENT = "top 30% sign", "sign"


@dataclass(frozen=True)
class Point:
    """Where a run is: tokens, bytes sent to and back from the servers, and sent and received."""

    tokens: float
    w2s: float
    s2w: float
    both: float


@dataclass(frozen=True)
class Result:
    """A setting and the logs of those of its seeds that have run."""

    setting: Setting
    logs: tuple[Log, ...]

    @property
    def label(self) -> str:
        """What it sends: logs do not say where that is not what was asked for."""
        return self.logs[0].run["label"].replace(ASKED_FOR, SENT)

    @property
    def short(self) -> str:
        """Its name in a sentence."""
        return f"{self.setting.family} {self.setting.level}".strip()

    @property
    def final(self) -> list[float]:
        """The final test loss of every seed."""
        return [log.evals[-1]["test_loss"] for log in self.logs]

    @property
    def final_text(self) -> str:
        """Their mean, and one standard deviation where there are several."""
        spread = f" ± {stdev(self.final):.4f}" if len(self.final) > 1 else ""
        return f"{mean(self.final):.4f}{spread}"

    @property
    def has_seeds(self) -> bool:
        """Whether enough seeds have run for a claim."""
        return len(self.logs) >= len(SEEDS)

    @property
    def bits(self) -> float:
        """Bits sent to the servers for a parameter in a step, on average."""
        log = self.logs[0]
        last = log.evals[-1]
        return 8 * last["w2s_bytes"] / last["step"] / log.run["parameters"]

    def sizes(self, sent: float) -> float:
        """Bytes as a multiple of the model's size in float32."""
        return sent / (BYTES_PER_PARAMETER * self.logs[0].run["parameters"])

    @property
    def by_both(self) -> list[tuple[float, float]]:
        """What is sent and received, x model size, above 0, and the test loss then: means."""
        rows = zip(*(log.evals for log in self.logs), strict=True)
        return [
            (self.sizes(sent), mean(record["test_loss"] for record in row))
            for row in rows
            if (sent := both_ways(self.logs[0], row[0]))
        ]

    def over(self, identity: "Result") -> float:
        """The loss gap: final test loss over the uncompressed run's, percent, by means of seeds."""
        return 100 * (mean(self.final) / mean(identity.final) - 1)

    def reach(self, target: float) -> list[Point | None]:
        """Where each seed reaches the target loss; None for one that does not."""
        return [reach(log, target) for log in self.logs]

    def sent(self, target: float) -> float | None:
        """What is sent to the servers up to the target loss, x model size; mean of the seeds."""
        points = self.reach(target)
        return self.sizes(mean(point.w2s for point in points)) if all(points) else None

    def both(self, target: float) -> float | None:
        """What is sent and received up to the target loss, x model size; mean of the seeds."""
        points = self.reach(target)
        return self.sizes(mean(point.both for point in points)) if all(points) else None


def read(directory: Path, settings: Sequence[Setting] = SETTINGS) -> dict[str, Result]:
    """The settings that have run, by name. Raises ValueError for a log that is not as it should."""
    results = read_settings(directory, settings)
    if "identity" not in results:
        raise ValueError(
            f"{directory} lacks identity-seed0.jsonl: run scripts/shakespeare/run.py first"
        )
    return results


def read_workers(directory: Path, of_two: dict[str, Result]) -> dict[int, dict[str, Result]]:
    """What has run with more workers, by their number and by the point, and ours of two."""
    found = {2: {one.setting.name: one for one in (of_two["identity"], *ours(of_two))}}
    for result in read_settings(directory, WORKER_SETTINGS).values():
        name = result.setting.name.partition("-")[2]
        found.setdefault(result.setting.workers, {})[name] = result
    return found


def read_momentum(directory: Path) -> dict[str, Result]:
    """Those of MOMENTUM_SETTINGS that have run, by name."""
    return read_settings(directory, MOMENTUM_SETTINGS)


def read_settings(directory: Path, settings: Sequence[Setting]) -> dict[str, Result]:
    """Those that have run, by name."""
    results = {}
    for setting in settings:
        paths = [directory / f"{setting.name}-seed{seed}.jsonl" for seed in setting.seeds]
        if logs := tuple(read_log(path) for path in paths if path.exists()):
            results[setting.name] = Result(setting, logs)
    return results


def lowest(results: Iterable[Result]) -> Result | None:
    """The one with the lowest final loss; None of none."""
    return min(results, key=lambda one: mean(one.final), default=None)


def of_condition(found: dict[str, Result], condition: str) -> dict[str, Result]:
    """Those whose names begin so, by the rest of their names."""
    begins = f"{condition}-"
    return {
        name.removeprefix(begins): result
        for name, result in found.items()
        if name.startswith(begins)
    }


def read_replay(directory: Path) -> dict[str, dict]:
    """What scripts/shakespeare/replay.py measured, by setting; nothing where it has not run."""
    path = directory / REPLAY_LOG
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def read_differences(directory: Path) -> list[dict]:
    """What scripts/shakespeare/differences.py measured; nothing where it has not run."""
    return _lines(directory / DIFFERENCES_LOG)


def read_changes(directory: Path) -> list[dict]:
    """What scripts/shakespeare/changes.py measured; nothing where it has not run."""
    return _lines(directory / CHANGES_LOG)


def read_sign_replay(directory: Path) -> list[dict]:
    """What scripts/shakespeare/sign_replay.py measured; nothing where it has not run."""
    return _lines(directory / SIGN_REPLAY_LOG)


def _lines(path: Path) -> list[dict]:
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def target_loss(identity: Result, share: float = TARGET_SHARE) -> float:
    """The uncompressed run's test loss at a share of its tokens, mean of its seeds."""
    losses = []
    for log in identity.logs:
        tokens = share * log.evals[-1]["tokens"]
        losses += [record["test_loss"] for record in log.evals if record["tokens"] == tokens]
    if len(losses) < len(identity.logs):
        raise ValueError(f"identity has no evaluation at {share:.0%} of its tokens")
    return mean(losses)


def both_ways(log: Log, record: dict) -> int:
    """Bytes that a worker had sent and received at a record.

    Logs from before `received_bytes` have runs with sharded servers, which send the model back
    whole. Where every worker serves, the same steps come from the messages of the others alone.
    """
    sent, back = record["w2s_bytes"], record["s2w_bytes"]
    if "received_bytes" in record:
        return sent + record["received_bytes"]
    config = log.run.get("config", {})
    if config.get("s2w", {}).get("_target_", "").endswith("Identity"):
        of_others = (log.run["world_size"] - 1) * sent
        back = min(back, of_others) if back else of_others
    return sent + back


def reach(log: Log, target: float) -> Point | None:
    """Where the test loss first is at most `target`, between two evaluations on a straight line."""
    before = {"tokens": 0, "w2s_bytes": 0, "s2w_bytes": 0, "both": 0, "test_loss": float("inf")}
    for record in ({**record, "both": both_ways(log, record)} for record in log.evals):
        if record["test_loss"] <= target:
            gap = before["test_loss"] - record["test_loss"]
            share = (before["test_loss"] - target) / gap if gap < float("inf") else 1.0
            return Point(
                *(
                    before[key] + share * (record[key] - before[key])
                    for key in ("tokens", "w2s_bytes", "s2w_bytes", "both")
                )
            )
        before = record
    return None


def savings(results: dict[str, Result], target: float) -> dict[str, float]:
    """How many times fewer bytes than the uncompressed run each setting sends to the target.

    By the means over seeds; a setting is left out where one of its seeds does not reach it.
    """
    sent = {
        name: mean(point.w2s for point in points)
        for name, result in results.items()
        if result.setting.family != "grid" and all(points := result.reach(target))
    }
    return {name: sent["identity"] / one for name, one in sent.items()}


def compressed(results: dict[str, Result]) -> list[Result]:
    """Our settings that compress and sync every step, in the study's order."""
    not_these = ("grid", "identity", *OTHERS, *LOCAL, *PEERS)
    return [result for result in results.values() if result.setting.family not in not_these]


def ours(results: dict[str, Result]) -> list[Result]:
    """All of ours that compress, of any number of steps per round."""
    return compressed(results) + [r for r in results.values() if r.setting.family in LOCAL]


def step_times(log: Path) -> dict[tuple[str, str], list[float]]:
    """Seconds of a step by rate and setting, all that scripts/shakespeare/network.py measured."""
    measured: dict[tuple[str, str], list[float]] = {}
    for record in _lines(log):
        measured.setdefault((record["rate"], record["name"]), []).append(record["seconds"])
    return measured


def slowdowns(log: Path) -> dict[tuple[str, str], list[float]]:
    """By rate and setting a step's seconds over those without a network, next in the repeat."""
    found: dict[tuple[str, str], list[float]] = {}
    waiting: dict[str, dict[str, float]] = {}  # by setting and rate
    for record in _lines(log):
        rate, name, seconds = record["rate"], record["name"], record["seconds"]
        if rate != UNLIMITED:
            waiting.setdefault(name, {})[rate] = seconds
            continue
        for slow, longer in waiting.pop(name, {}).items():
            found.setdefault((slow, name), []).append(longer / seconds)
    return found


def times(results: dict[str, Result], target: float, log: Path) -> dict[str, dict[str, float]]:
    """Seconds to the target by rate and setting: steps to it, times the median step."""
    found: dict[str, dict[str, float]] = {}
    for (rate, name), seconds in step_times(log).items():
        result = results.get(name)
        if result and all(points := result.reach(target)):
            last = result.logs[0].evals[-1]
            steps = mean(point.tokens for point in points) * last["step"] / last["tokens"]
            found.setdefault(rate, {})[name] = steps * median(seconds)
    return found
