"""What the logs of the study say: final losses, the target, what it takes, and who is ahead."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from scripts.shakespeare.runs import SEEDS, STUDY, Setting
from scripts.studies import read_records
from training.records import BYTES_PER_PARAMETER, Log
from training.renamed import modern_run

RESULTS = Path(__file__).resolve().parents[2] / "results" / "shakespeare"
LOGS = RESULTS / "logs"
TARGET_SHARE = 0.75  # of the uncompressed run's tokens
MORE = 1.01  # times what another method sends, that ours may send beside it
UNCOMPRESSED_BITS = 32  # per parameter and step
FEWER = 100  # times fewer bytes, of what ends closest to the uncompressed run
# Bytes of evaluations: to the servers, and all that a worker sends and receives.
SENT, BOTH = "w2s_bytes", "both_bytes"
LOCAL = "local steps"
# Families that are not ours: those that sync every step, and those of local steps.
EVERY_STEP = tuple(dict.fromkeys(one.family for one in STUDY["baselines"]))
PEERS = tuple(dict.fromkeys(one.family for one in STUDY["peers"] if one.family not in EVERY_STEP))
OTHERS = EVERY_STEP + PEERS
# Lines of the envelopes, and their families; the last one is of all of ours that compress.
METHODS: dict[str, tuple[str, ...]] = {
    "AdamW + DDP": ("AdamW",),
    "Dion": ("Dion", "Dion float32"),
    "Muon +\nPowerSGD": ("Muon + PowerSGD",),
    "Muon +\nGreedyLore": ("Muon + GreedyLore",),
    "EF21-Muon,\nuncompressed": ("identity",),
    "Muon + DDP": ("Muon",),
    "DeMo": ("DeMo",),
    "DiLoCo": ("DiLoCo",),
    "MuLoCo": ("MuLoCo",),
    "SparseLoCo": ("SparseLoCo",),
    "EF21-Muon and local steps, compressed": (),
}
UNCOMPRESSED, OURS = "EF21-Muon,\nuncompressed", "EF21-Muon and local steps, compressed"
# The first runs of signs asked for the largest 30 %. With their places these are more bytes than
# the signs of all entries, which were therefore sent.
ASKED_FOR, GAVE_WAY = "top 30% sign", "sign"
BETWEEN = 200  # places at which lines are compared, beside their own points
Line = Sequence[tuple[float, float]]  # (bytes, test loss), from few bytes to many


@dataclass(frozen=True)
class Result:
    """A setting and the logs of those of its seeds that have run, beside its baseline."""

    setting: Setting
    logs: tuple[Log, ...]
    compared_with: "Result | None" = None  # None for a baseline itself

    @property
    def baseline(self) -> "Result":
        return self.compared_with or self

    @property
    def run(self) -> dict:
        """The run record of its first seed."""
        return self.logs[0].run

    @property
    def last(self) -> dict:
        """The last evaluation of its first seed."""
        return self.logs[0].evals[-1]

    @property
    def label(self) -> str:
        """What it sends: logs do not say where that is not what was asked for."""
        return self.run["label"].replace(ASKED_FOR, GAVE_WAY)

    @property
    def short(self) -> str:
        """Its name in a sentence."""
        return f"{self.setting.family} {self.setting.level}".strip()

    @property
    def ends(self) -> list[float]:
        """The final test loss of every seed."""
        return [log.evals[-1]["test_loss"] for log in self.logs]

    @property
    def loss(self) -> float:
        """The mean of the final test losses."""
        return mean(self.ends)

    @property
    def loss_text(self) -> str:
        """Their mean, and one standard deviation where there are several."""
        spread = f" ± {stdev(self.ends):.4f}" if len(self.ends) > 1 else ""
        return f"{self.loss:.4f}{spread}"

    @property
    def gap(self) -> float:
        """The loss gap: its final test loss over its baseline's, percent, by means of seeds."""
        return 100 * (self.loss / self.baseline.loss - 1)

    @property
    def has_seeds(self) -> bool:
        """Whether enough seeds have run for a claim."""
        return len(self.logs) >= len(SEEDS)

    @property
    def bits(self) -> float:
        """Bits sent to the servers for a parameter in a step, on average."""
        return 8 * self.last[SENT] / self.last["step"] / self.run["parameters"]

    def sizes(self, sent: float) -> float:
        """Bytes as a multiple of the model's size in float32."""
        return sent / (BYTES_PER_PARAMETER * self.run["parameters"])

    @property
    def by_both(self) -> Line:
        """What is sent and received, x model size, above 0, and the test loss then: means."""
        rows = zip(*(log.evals for log in self.logs), strict=True)
        return [
            (self.sizes(row[0][BOTH]), mean(record["test_loss"] for record in row))
            for row in rows
            if row[0][BOTH]
        ]

    @property
    def moved(self) -> float:
        """What is sent and received in the whole run, x model size."""
        return self.sizes(self.last[BOTH])

    @property
    def times_fewer(self) -> float:
        """How many times fewer bytes it sends and receives in the whole run than its baseline."""
        return self.baseline.moved / self.moved

    @property
    def target(self) -> float:
        """The baseline's test loss at TARGET_SHARE of its tokens, mean of its seeds."""
        losses = []
        for log in self.baseline.logs:
            tokens = TARGET_SHARE * log.evals[-1]["tokens"]
            losses += [record["test_loss"] for record in log.evals if record["tokens"] == tokens]
        if len(losses) < len(self.baseline.logs):
            name = self.baseline.setting.name
            raise ValueError(f"{name} has no evaluation at {TARGET_SHARE:.0%} of its tokens")
        return mean(losses)

    def to_target(self, key: str) -> float | None:
        """The tokens, or bytes, at which the target is reached: mean of the seeds.

        None if one of them does not reach it.
        """
        reached = [reach(log, self.target, key) for log in self.logs]
        return None if None in reached else mean(reached)

    def times_to_target(self, key: str) -> float | None:
        """How many times fewer bytes than its baseline it takes to the target."""
        reached = self.to_target(key)
        return reached and self.baseline.to_target(key) / reached

    def sizes_to_target(self, key: str) -> float | None:
        """The bytes as multiples of the model's size."""
        reached = self.to_target(key)
        return reached and self.sizes(reached)


Results = dict[str, Result]


def read(directory: Path = LOGS) -> Results:
    """The settings that have run, by name, in the study's order.

    Raises ValueError where one has run and its baseline has not.
    """
    found: dict[str, Result] = {}
    for log, settings in STUDY.items():
        runs = read_runs(directory / f"{log}.jsonl")
        for one in settings:
            names = [f"{one.name}-seed{seed}" for seed in one.seeds]
            if logs := tuple(runs[name] for name in names if name in runs):
                found[one.name] = Result(one, logs)
    for one in found.values():
        if one.setting.baseline not in found:
            raise ValueError(
                f"{directory} lacks {one.setting.baseline}, with which {one.setting.name} is "
                "compared: run scripts/shakespeare/run.py"
            )
    baselines = {one.setting.baseline for one in found.values()}
    return {
        name: one if name in baselines else replace(one, compared_with=found[one.setting.baseline])
        for name, one in found.items()
    }


def read_runs(path: Path) -> dict[str, Log]:
    """The logs of a file by the names of runs, in today's words; evaluations have BOTH too."""
    found: dict[str, list[dict]] = {}
    for record in read_records(path):
        found.setdefault(record["name"], []).append(record)
    return {
        name: Log(
            modern_run(run),
            [],
            [one | {BOTH: both_ways(run, one)} for one in records if one["record"] == "eval"],
            records[-1],
        )
        for name, (run, *records) in found.items()
    }


def both_ways(run: dict, record: dict) -> int:
    """Bytes that a worker had sent and received at a record.

    Logs from before `received_bytes` have runs with sharded servers, which send the model back
    whole. Where every worker serves, the same steps come from the messages of the others alone.
    """
    sent, back = record["w2s_bytes"], record["s2w_bytes"]
    if "received_bytes" in record:
        return sent + record["received_bytes"]
    if run.get("config", {}).get("s2w", {}).get("_target_", "").endswith("Identity"):
        of_others = (run["world_size"] - 1) * sent
        back = min(back, of_others) if back else of_others
    return sent + back


def reach(log: Log, target: float, key: str) -> float | None:
    """What the test loss first is at most `target` at, between two evaluations on a line."""
    before = {key: 0, "test_loss": float("inf")}
    for record in log.evals:
        if record["test_loss"] <= target:
            gap = before["test_loss"] - record["test_loss"]
            share = (before["test_loss"] - target) / gap if gap < float("inf") else 1.0
            return before[key] + share * (record[key] - before[key])
        before = record
    return None


def of_condition(results: Results, condition: str) -> Results:
    """What has run under a condition, by the rest of its name, but for runs on a GPU alone."""
    begins = f"{condition}-"
    return {
        name.removeprefix(begins): one
        for name, one in results.items()
        if name.startswith(begins) and one.setting.device != "cuda"
    }


def by_workers(results: Results) -> dict[int, Results]:
    """Ours and the uncompressed run, by the number of workers and the point."""
    of_two = {one.setting.name: one for one in (results["identity"], *ours(results))}
    return {2: of_two} | {n: of_condition(results, f"workers/{n}") for n in (4, 8)}


def lowest(results: Iterable[Result]) -> Result | None:
    """The one with the lowest final loss; None of none."""
    return min(results, key=lambda one: one.loss, default=None)


def of_families(results: Results, *families: str) -> list[Result]:
    """Those of these families, in the study's order."""
    return [one for one in results.values() if one.setting.family in families]


def by_family(results: Results) -> dict[str, list[Result]]:
    """The settings that figures of all of them show, in the study's order."""
    families: dict[str, list[Result]] = {}
    for name, one in results.items():
        if "/" not in name and one.setting.family not in ("feedback", LOCAL, *PEERS):
            families.setdefault(one.setting.family, []).append(one)
    return families


def compressed(results: Results) -> list[Result]:
    """Our settings that compress and sync every step, in the study's order."""
    not_these = ("identity", LOCAL, *OTHERS)
    return [
        one
        for name, one in results.items()
        if "/" not in name and one.setting.family not in not_these
    ]


def ours(results: Results) -> list[Result]:
    """All of ours that compress, of any number of steps per round."""
    return compressed(results) + of_families(results, LOCAL)


def closest(results: Results) -> Result:
    """Of ours with seeds that move FEWER times fewer bytes, the one with the lowest final loss."""
    return lowest(one for one in ours(results) if one.has_seeds and one.times_fewer >= FEWER)


def fewest(results: Results) -> Result:
    """Of ours with seeds the one that reaches the target with the fewest bytes both ways."""
    reached = [one for one in ours(results) if one.has_seeds and one.to_target(BOTH)]
    return min(reached, key=lambda one: one.to_target(BOTH))


def rivals(
    others: Iterable[Result], of_ours: list[Result], amount: Callable[[Result], float]
) -> list[tuple[Result, Result]]:
    """Beside every other one the best of ours that sends MORE times as much at most."""
    pairs = [
        (other, lowest(one for one in of_ours if amount(one) <= MORE * amount(other)))
        for other in others
    ]
    return [(other, best) for other, best in pairs if best]


def at_their_rate(results: Results) -> list[tuple[Result, Result]]:
    """Methods that sync every step and compress, by bits to the servers."""
    others = [one for one in of_families(results, *EVERY_STEP) if one.bits < UNCOMPRESSED_BITS]
    return rivals(others, [results["identity"], *compressed(results)], lambda one: one.bits)


def at_their_bytes(results: Results) -> list[tuple[Result, Result]]:
    """Methods of local steps and DeMo, by what is sent and received."""
    others = of_families(results, *PEERS, "DeMo")
    return rivals(others, ours(results), lambda one: one.moved)


def of_method(results: Results, method: str) -> list[Result]:
    """The settings that a line of METHODS is of."""
    families = METHODS[method]
    return of_families(results, *families) if families else ours(results)


def envelope(lines: Sequence[Line]) -> Line:
    """The lowest loss that any line has reached with at most so many bytes, up to the lowest.

    Between its points a line is straight over the logarithm of bytes, which are above 0.
    """
    own = {size for line in lines for size, _ in line}
    between = np.geomspace(min(own), max(own), BETWEEN + 2)[1:-1]
    sizes = np.array(sorted(own | set(between.tolist())))
    reached = []
    for line in lines:
        of_line, losses = np.array(line).T
        reached.append(np.interp(np.log(sizes), np.log(of_line), losses, left=np.inf))
    lowest_so_far = np.minimum.accumulate(np.min(reached, axis=0))
    end = int(lowest_so_far.argmin()) + 1
    return list(zip(sizes[:end].tolist(), lowest_so_far[:end].tolist(), strict=True))


def envelopes(results: Results) -> dict[str, Line]:
    """Of every method that has run, by bytes sent and received."""
    members = {method: of_method(results, method) for method in METHODS}
    return {method: envelope([one.by_both for one in m]) for method, m in members.items() if m}


def ahead(results: Results) -> list[tuple[str, float, float]]:
    """Where another method's envelope is below ours: its name, and from which size to which."""
    lines = envelopes(results)
    sizes, losses = np.array(lines.pop(OURS)).T
    lines.pop(UNCOMPRESSED)
    found = []
    for method, line in lines.items():
        own, its = np.array(line).T
        ours_there = np.interp(np.log(own), np.log(sizes), losses, left=np.inf)
        if len(lower := own[its < ours_there]):
            found.append((method.replace("\n", " "), lower[0], lower[-1]))
    return found
