"""A soak: a tiny run, again and again, under random faults, must end as it does without any.

    sudo python scripts/soak.py [--faults 30] [--minutes 20] [--seed 0] [KEY=VALUE ...]

Two workers on two nodes, which are network namespaces of this machine (scripts/netns.py), train on
a small file system of their own, mounted from a file. Faults come at random times, those of a seed
always in the same order; torchrun restarts the workers, or the job is launched again, with
resume=auto, until the run is completed. Then its log, but for times, and its last checkpoint have
to equal those of a run without faults, bit for bit. The memory of rank 0 over 500 undisturbed steps
is measured too. Needs root on Linux, iproute2 and e2fsprogs; what was made is removed at the end,
also by SIGINT and SIGTERM. Exits with 1 if a round differs or fewer faults happened.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import disk
from scripts.disk import Disk
from scripts.figures import LOG_NAME
from scripts.memory import WARM_UP, measure
from scripts.netns import MTU, JobError, Network, requirements_missing
from training.checkpoint import read_facts
from training.config import ROOT
from training.log import completed
from training.workers import RunError

OUTPUT = ROOT / "results" / "soak"
TINY = [
    *("model.layers=1", "model.width=32", "model.heads=2", "model.context=32"),
    *("batch.sequences=4", "batch.per_forward=1", "eval.tokens=320"),
    *("compressor@w2s=topk", "compressor@s2w=topk"),
]
ROUND = [
    *("steps=120", "eval.every=20", "log_every=1", "check_every=20"),
    *("checkpoint.every=4", "checkpoint.keep=3", "resume=auto"),
]
TIMEOUT = 8  # train.py's: seconds that a worker waits for another
LAUNCH_SECONDS = 300  # for a job that hangs in spite of it
VARYING = ("seconds", "phases", "started", "optimizer_share", "config", "overrides", "commit")
TELLING = r"(?:error: |ignored a damaged checkpoint|stopped as asked|going on from)[^\r\n]*"


def outcome(directory: Path) -> tuple[list[dict], dict[str, str]]:
    """What equal runs have in common: the log without times, the last checkpoint's SHA-256s."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    log = [{k: v for k, v in json.loads(line).items() if k not in VARYING} for line in lines]
    last = max((directory / "checkpoints").glob("step-????????"))
    return log, {file.name: sha256(file) for file in last.glob("*.distcp")}


def is_whole(checkpoint: Path) -> bool:
    """Whether all its files are as they were written."""
    with suppress(OSError, RunError):
        files = read_facts(checkpoint)["files"]
        return all(sha256(checkpoint / name) == digest for name, digest in files.items())
    return False


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Job:
    """train.py on both nodes, in the background; what its workers write is added to `log`."""

    def __init__(self, network: Network, log: Path, arguments: list[str]):
        self.network = network
        environment = {"PET_MAX_RESTARTS": "2", "PET_NO_PYTHON": "1"}  # torchrun's options
        shell = ["bash", "-c", f'exec "$0" "$@" >>{log} 2>&1', sys.executable]
        command = [*shell, ROOT / "train.py", *arguments]

        def launch() -> None:
            with suppress(JobError):
                network.torchrun(*command, environment=environment, timeout=LAUNCH_SECONDS)

        self._thread = threading.Thread(target=launch)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float | None = None, until: Callable = lambda: False) -> bool:
        """Until the job has ended, the time is over or `until()`; returns whether it still runs."""
        end = math.inf if seconds is None else time.monotonic() + seconds
        while self.running and time.monotonic() < end and not until():
            self._thread.join(0.05)
        return self.running

    def worker(self, rank: int) -> int | None:
        """Its process id; None while there is none."""
        for pid in self._processes(rank):
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"train.py" in command and b"bash" not in command:
                    return pid
        return None

    def send(self, rank: int, number: signal.Signals) -> bool:
        """A signal for a worker; whether it was there."""
        pid = self.worker(rank)
        with suppress(ProcessLookupError):
            os.kill(pid, number) if pid else None
            return pid is not None
        return False

    def kill(self) -> None:
        """End the job as a loss of power does."""
        while self.running:
            for pid in [*self._processes(0), *self._processes(1)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._thread.join(0.05)

    def _processes(self, rank: int) -> list[int]:
        command = ["ip", "netns", "pids", self.network.names[rank]]
        return [int(pid) for pid in subprocess.check_output(command, text=True).split()]


class Soak:
    """Rounds of the run, and the faults in them: `records`, one a fault.

    A kind of fault is a method: it gets the job and the fault's draw, and says whether it happened.
    """

    def __init__(self, network: Network, disk: Disk, output: Path, options: argparse.Namespace):
        self.network, self.disk, self.output = network, disk, output
        self.directory = disk.path / "run"
        self.arguments = [*TINY, *ROUND, *options.overrides, f"directory={self.directory}"]
        self.arguments += [f"--timeout={TIMEOUT}"]
        self.draws = draws(options.faults, options.kinds.split(","), options.seed)
        self.records: list[dict] = []
        self.launches, self._settled = 0, 0
        self.start, self.last_start = time.monotonic(), 60 * options.minutes

    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 1)

    def due(self) -> bool:
        """Whether there are faults to come."""
        return len(self.records) < len(self.draws) and self.seconds() < self.last_start

    def round(self, number: int) -> tuple:
        """The outcome of a run, with faults unless it is round 0."""
        shutil.rmtree(self.directory, ignore_errors=True)
        while not completed(self.directory):
            self.launches += 1
            if self.launches > 3 * len(self.draws) + 9:
                raise RuntimeError(f"{self.launches} launches do not get on: {self.news()}")
            job = Job(self.network, self.output, self.arguments)
            try:
                while number and self.due() and self.moment(job):
                    self.inject(job, number)
                job.wait()
            finally:
                job.kill()
        self.settle()
        return outcome(self.directory)

    def moment(self, job: Job) -> bool:
        """Wait for the time of the next fault; whether the job runs then."""
        draw, since, log = self.draws[len(self.records)], time.time(), self.directory / LOG_NAME
        if not draw["early"]:
            job.wait(until=lambda: log.exists() and log.stat().st_mtime > since)
        return job.wait(draw["delay"])

    def inject(self, job: Job, number: int) -> None:
        draw = self.draws[len(self.records)]
        job.wait(until=lambda: job.worker(draw["rank"]))
        self.settle()
        newest = [path.name[5:] for path in self.checkpoints()[-1:]]
        record = {"record": "fault", "round": number, "seconds": self.seconds(), "newest": newest}
        if job.running and getattr(self, draw["kind"])(job, draw):
            self.records.append(record | draw)
            print(f"{self.seconds():6.1f} s  round {number}  {draw['kind']}", flush=True)

    def settle(self) -> None:
        """What the workers have said since the last fault is what came of it."""
        if self.records:
            self.records[-1].setdefault("said", self.news())
        self._settled = self.output.stat().st_size

    def news(self) -> list[str]:
        """The telling lines that the workers have written since `settle`."""
        text = self.output.read_bytes()[self._settled :].decode(errors="replace")
        return re.findall(TELLING, text.replace(f"{self.directory}", "run"))

    def checkpoints(self) -> list[Path]:
        """From old to new."""
        return sorted((self.directory / "checkpoints").glob("step-????????"))

    def kill(self, job: Job, draw: dict) -> bool:
        return job.send(draw["rank"], signal.SIGKILL)

    def preempt(self, job: Job, draw: dict) -> bool:
        """What a scheduler sends to one worker."""
        return job.send(draw["rank"], signal.SIGTERM)

    def pause(self, job: Job, draw: dict) -> bool:
        """Shorter than the timeout."""
        happened = job.send(draw["rank"], signal.SIGSTOP)
        job.wait(draw["lasts"])
        return job.send(draw["rank"], signal.SIGCONT) and happened

    def hang(self, job: Job, draw: dict) -> bool:
        """Longer than the timeout: until another worker says so."""
        happened = job.send(draw["rank"], signal.SIGSTOP)
        job.wait(5 * TIMEOUT, until=lambda: self.errors(1))
        job.send(draw["rank"], signal.SIGCONT)
        return happened

    def slow(self, job: Job, draw: dict) -> bool:
        """What the node sends goes at 1 Mbit/s for a while."""
        discipline = f"dev eth0 root tbf rate 1mbit burst {4 * MTU} latency 1s".split()
        self._on(draw["rank"], "tc", "qdisc", "add", *discipline)
        job.wait(draw["lasts"])
        self._on(draw["rank"], "tc", "qdisc", "del", "dev", "eth0", "root")
        return True

    def cut(self, job: Job, draw: dict) -> bool:
        """The node's link is down until both workers say so."""
        self._on(draw["rank"], "ip", "link", "set", "eth0", "down")
        job.wait(5 * TIMEOUT, until=lambda: self.errors(2))
        self._on(draw["rank"], "ip", "link", "set", "eth0", "up")
        return True

    def fill(self, job: Job, draw: dict) -> bool:
        """The disk is full until a worker says so."""
        self.disk.fill()
        job.wait(5 * TIMEOUT, until=lambda: self.errors(1))
        self.disk.free()
        return True

    def corrupt(self, job: Job, draw: dict) -> bool:
        """A bit of the newest whole checkpoint is flipped, if there is one before it."""
        job.wait(until=lambda: len(self.checkpoints()) > 1)
        job.kill()
        whole = [path for path in self.checkpoints() if is_whole(path)]
        if len(whole) < 2:
            return False
        files = sorted(whole[-1].iterdir())
        file = files[draw["place"] % len(files)]
        content = bytearray(file.read_bytes())
        content[draw["place"] % len(content)] ^= 1 << draw["place"] % 8
        file.write_bytes(content)
        return True

    def errors(self, count: int) -> bool:
        """Whether workers have spoken of so many errors."""
        return sum(line.startswith("error: ") for line in self.news()) >= count

    def _on(self, rank: int, *command: str) -> None:
        in_node = ["ip", "netns", "exec", self.network.names[rank]]
        subprocess.run([*in_node, *command], check=True)


KINDS = ("kill", "hang", "pause", "preempt", "slow", "cut", "fill", "corrupt")


def draws(count: int, kinds: list[str], seed: int) -> list[dict]:
    """What is random about `count` faults, in their order: each kind as often as any other."""
    generator = random.Random(seed)
    order = []
    while len(order) < count:
        order += generator.sample(kinds, len(kinds))
    return [
        {
            "kind": kind,
            "rank": generator.randrange(2),
            "early": generator.random() < 0.2,  # perhaps before the first step
            "delay": round(generator.uniform(0, 4), 2),
            "lasts": round(generator.uniform(0.5, TIMEOUT / 2), 2),
            "place": generator.randrange(1 << 24),
        }
        for kind in order[:count]
    ]


def soak(options: argparse.Namespace, log: TextIO) -> list[dict]:
    """All rounds; what came of them goes to the log, and is returned."""
    records = []

    def write(*new: dict) -> None:
        records.extend(new)
        log.writelines(json.dumps(record) + "\n" for record in new)
        log.flush()

    with tempfile.TemporaryDirectory(prefix="ef21-soak-") as folder, Network(2) as network:
        if options.memory:
            often = "checkpoint.every=20"
            write(measure(network, Path(folder), [*TINY, *ROUND, often, *options.overrides]))
        output = Path(folder, "output")
        output.touch()
        with Disk() as disk:
            run = Soak(network, disk, output, options)
            undisturbed, number = run.round(0), 0
            while run.due():
                number += 1
                before = len(run.records)
                equal = run.round(number) == undisturbed
                write(*run.records[before:], {"record": "round", "round": number, "equal": equal})
        facts = {"faults": len(run.records), "launches": run.launches, "seconds": run.seconds()}
        equal = all(record["equal"] for record in records if record["record"] == "round")
        write({"record": "end", "seed": options.seed, "equal": equal} | facts)
    return records


def table(records: list[dict]) -> str:
    """README.md of the results."""
    end = records[-1]
    memory = [record for record in records if record["record"] == "memory"]
    faults = [record for record in records if record["record"] == "fault"]
    rounds = sum(record["record"] == "round" for record in records)
    text = [
        "# Soak\n",
        f"`sudo python scripts/soak.py --faults {end['faults']} --seed {end['seed']}`: "
        f"{end['faults']} faults in {rounds} rounds of a run of two workers on two nodes, "
        f"{end['launches']} launches, {end['seconds']:.0f} s. Log and last checkpoint of every "
        f"round equal those of the run without faults, bit for bit: "
        f"**{'yes' if end['equal'] else 'NO'}**.\n",
    ]
    for one in memory:
        kib = one["kib"]
        text.append(
            f"Memory of rank 0 in an undisturbed run: {kib[0]:,} KiB after the first step, "
            f"{kib[WARM_UP]:,} KiB after {WARM_UP}, {kib[-1]:,} KiB after {len(kib)}. Slope over "
            f"the last {len(kib) - WARM_UP} steps: {one['slope_kib']:.3f} +- "
            f"{one['slope_95_kib']:.3f} KiB a step (95 %).\n"
        )
    text += [
        "| s | round | fault | rank | newest checkpoint | resumed from | what the workers said |",
        "| ---: | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for fault in faults:
        resumed = [line[-8:] for line in fault["said"] if line.startswith("going on from")]
        said = [re.sub(r": (see|go on|start) .*|; earlier .*", "", line) for line in fault["said"]]
        said = [line for line in said if not line.startswith("going on from")]
        cells = [fault["seconds"], fault["round"], fault["kind"], fault["rank"]]
        cells += [", ".join(names) or "-" for names in (fault["newest"], resumed, said)]
        text.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*text, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--faults", type=int, default=30, help="(default %(default)s)")
    parser.add_argument("--minutes", type=float, default=20, help="at most, for faults to begin")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="(default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder (default %(default)s)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--redraw", action="store_true", help="README.md from soak.jsonl alone")
    options = parser.parse_intermixed_args()
    if options.redraw:
        lines = (options.out / "soak.jsonl").read_text().splitlines()
        (options.out / "README.md").write_text(table([json.loads(line) for line in lines]))
        return 0
    if missing := requirements_missing() or disk.requirements_missing():
        print(f"error: {missing}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "soak.jsonl").open("w") as log:
        records = soak(options, log)
    (options.out / "README.md").write_text(table(records))
    end = records[-1]
    print(f"{end['faults']} faults in {end['seconds']:.0f} s, equal: {end['equal']}")
    return 0 if end["equal"] and end["faults"] == options.faults else 1


if __name__ == "__main__":
    sys.exit(main())
