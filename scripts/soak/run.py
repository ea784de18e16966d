"""A soak: a tiny run, again and again, under random faults, must end as it does without any.

    sudo python scripts/soak/run.py [--faults 30] [--minutes 20] [--seed 0] [KEY=VALUE ...]

Two workers on two nodes, which are network namespaces of this machine (scripts/netns.py), train on
a small file system of their own, mounted from a file. Faults come at random times, those of a seed
always in the same order; torchrun restarts the workers, or the job is launched again, with
resume=auto, until the run is completed. Then its log, but for times, and its last checkpoint have
to equal those of a run without faults, bit for bit. Needs root on Linux, iproute2 and e2fsprogs;
what was made is removed at the end, also by SIGINT and SIGTERM. Exits with 1 if a round differs or
fewer faults happened.
"""

import argparse
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts import faults
from scripts.faults import TINY, answer, cut, draws, hand_in, is_whole, outcome, slow, stopped
from scripts.netns import Job, Network, output_of, requirements_missing
from scripts.studies import command, markdown
from training.config import ROOT
from training.log import completed
from training.records import LOG_NAME
from training.workers import RunError

LOG = ROOT / "results" / "soak" / "soak.jsonl"
TIMEOUT = 8  # train.py's: seconds that a worker waits for another
LAUNCH_SECONDS = 300  # for a job that hangs in spite of it
TELLING = r"(?m)(?:^error: |ignored a damaged checkpoint|stopped as asked|resuming from)[^\r\n]*"
MIB = 16  # of the disk
KINDS = ("kill", "hang", "pause", "preempt", "slow", "cut", "fill", "corrupt")
OPTIONS = faults.options(KINDS, faults=30, minutes=20)
RUN = [
    *(*TINY, "batch.global_size=4", "batch.micro_size=1", "eval.tokens=320"),
    *("compressor@w2s=topk", "compressor@s2w=topk"),
    *("steps=120", "eval.every=20", "log_every=1", "check_every=20"),
    *("checkpoint.every=4", "checkpoint.keep=3", "resume=auto"),
]

RESUMED = ("going on from", "resuming from")  # as earlier versions say it, and today's
ADVICE = re.compile(r": (see|go on|resume|start) .*|; earlier .*")  # of what workers say


@contextmanager
def new_disk() -> Iterator[Path]:
    """The folder on which a file system of `MIB` is mounted, from a file, in the context."""
    with tempfile.TemporaryDirectory(prefix="ef21-soak-") as folder:
        image, path = Path(folder, "image"), Path(folder, "mounted")
        path.mkdir()
        with image.open("wb") as file:
            file.truncate(MIB << 20)
        output_of("mkfs.ext4", "-q", "-m", "0", str(image))
        try:
            output_of("mount", "-o", "loop", str(image), str(path))
            yield path
        finally:
            if path.is_mount():
                output_of("umount", str(path))


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """No byte of it is free."""
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    yield
    (disk / "ballast").unlink()


def disk_missing() -> str | None:
    """Why none can be mounted here, in one line; None if it can."""
    try:
        with new_disk():
            return None
    except (OSError, RuntimeError) as error:
        return f"a file system in a file cannot be mounted: {error}"


@dataclass
class Soak:
    """Rounds of the run that `arguments` configure, and the faults in them: `records`, one a fault.

    It lies in `directory`, what its workers write is added to `output`. No fault begins after
    `last_start` seconds. A kind of fault is a method: it gets the job and the fault's draw, and
    returns whether it happened.
    """

    network: Network
    disk: Path
    output: Path
    arguments: list[str]
    draws: list[dict]
    last_start: float

    def __post_init__(self):
        self.directory = self.disk / "run"
        self.records: list[dict] = []
        self.start, self.launches, self._settled = time.monotonic(), 0, 0
        self.output.touch()

    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 1)

    def due(self) -> bool:
        """Whether there are faults to come."""
        return len(self.records) < len(self.draws) and self.seconds() < self.last_start

    def round(self, number: int) -> None:
        """A run from its start to its end, with faults unless it is round 0."""
        shutil.rmtree(self.directory, ignore_errors=True)
        while not completed(self.directory):
            self.launches += 1
            if self.launches > 3 * len(self.draws) + 9:
                raise RunError(f"{self.launches} launches do not get on: {self.news()}")
            job = self.launch()
            try:
                while number and self.due() and self.moment(job):
                    self.inject(job, number)
                job.wait()
            finally:
                job.kill()
        self.settle()

    def launch(self) -> Job:
        """Workers start again twice, before the job has to."""
        own = [f"directory={self.directory}", f"--timeout={TIMEOUT}"]
        command, again = [str(ROOT / "train.py"), *self.arguments, *own], {"PET_MAX_RESTARTS": "2"}
        return Job(self.network, command, 2 * [self.output], again, LAUNCH_SECONDS)

    def moment(self, job: Job) -> bool:
        """Wait for the time of the next fault; whether the job runs then."""
        draw, since, log = self.draws[len(self.records)], time.time(), self.directory / LOG_NAME
        if not draw["early"]:
            job.wait(until=lambda: log.exists() and log.stat().st_mtime > since)
        return job.wait(draw["delay"])

    def inject(self, job: Job, number: int) -> None:
        draw = self.draws[len(self.records)]
        job.wait(until=lambda: job.workers(draw["rank"]))
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
        with stopped(job, draw["rank"]) as happened:
            job.wait(draw["lasts"])
        return happened

    def hang(self, job: Job, draw: dict) -> bool:
        """Longer than the timeout: until another worker says so."""
        with stopped(job, draw["rank"]) as happened:
            self.wait_for_errors(job, 1)
        return happened

    def slow(self, job: Job, draw: dict) -> bool:
        with slow(self.network, draw["rank"]):
            job.wait(draw["lasts"])
        return True

    def cut(self, job: Job, draw: dict) -> bool:
        """Until both workers say so."""
        with cut(self.network, draw["rank"]):
            self.wait_for_errors(job, 2)
        return True

    def fill(self, job: Job, draw: dict) -> bool:
        """The disk is full until a worker says so."""
        with full(self.disk):
            return self.wait_for_errors(job, 1)

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

    def wait_for_errors(self, job: Job, count: int) -> bool:
        """Until workers have spoken of so many errors, if they do in time; whether they have."""

        def spoken() -> bool:
            return sum(line.startswith("error: ") for line in self.news()) >= count

        job.wait(5 * TIMEOUT, until=spoken)
        return spoken()


def details(generator: Random) -> dict:
    return {
        "rank": generator.randrange(2),
        "early": generator.random() < 0.2,  # perhaps before the first step
        "delay": round(generator.uniform(0, 4), 2),
        "lasts": round(generator.uniform(0.5, TIMEOUT / 2), 2),
        "place": generator.randrange(1 << 24),
    }


def soak(options: argparse.Namespace) -> Iterator[dict]:
    """The records of all rounds."""
    if missing := requirements_missing() or disk_missing():
        raise RunError(missing)
    arguments, all_equal = [*RUN, *options.overrides], True
    with (
        tempfile.TemporaryDirectory(prefix="ef21-soak-") as folder,
        Network(2) as network,
        new_disk() as disk,
    ):
        output, last_start = Path(folder, "output"), 60 * options.minutes
        run = Soak(network, disk, output, arguments, draws(options, details), last_start)
        run.round(0)
        undisturbed, number = outcome(run.directory), 0
        while run.due():
            number += 1
            before = len(run.records)
            run.round(number)
            equal = outcome(run.directory) == undisturbed
            all_equal = all_equal and equal
            yield from run.records[before:]
            yield {"record": "round", "round": number, "equal": equal}
    came = {"faults": len(run.records), "launches": run.launches, "seconds": run.seconds()}
    yield {"record": "end", "seed": options.seed, "equal": all_equal} | came
    if len(run.records) < options.faults:
        raise RunError(
            f"{len(run.records)} of {options.faults} faults happened in {options.minutes:g} "
            "minutes: give more --minutes, or --redraw for a page of these"
        )


def draw(records: list[dict], folder: Path) -> str:
    return hand_in(report(records), records[-1]["equal"], folder)


def report(records: list[dict]) -> str:
    """What happened in sentences, and a table of the faults."""
    end = records[-1]
    rounds = sum(record["record"] == "round" for record in records)
    heading = ["s", "round", "fault", "rank", "newest checkpoint", "resumed from"]
    faults = [_fault(record) for record in records if record["record"] == "fault"]
    table = markdown([[*heading, "what the workers said"], *faults], text_columns=(2, 6))
    return f"""# Soak

`sudo python scripts/soak/run.py --faults {end["faults"]} --seed {end["seed"]}`: \
{end["faults"]} faults in {rounds} rounds of a run of two workers on two nodes, \
{end["launches"]} launches, {end["seconds"]:.0f} s. Log and last checkpoint of every \
round equal those of the run without faults, bit for bit: {answer(end["equal"])}.

{table}
"""


def _fault(record: dict) -> list[str]:
    resumed = [line[-8:] for line in record["said"] if line.startswith(RESUMED)]
    said = [ADVICE.sub("", line) for line in record["said"] if not line.startswith(RESUMED)]
    lists = (", ".join(names) or "-" for names in (record["newest"], resumed, said))
    numbers = (record["seconds"], record["round"], record["kind"], record["rank"])
    return [*map(str, numbers), *lists]


def main(arguments: Sequence[str] | None = None) -> int:
    return command(__doc__, LOG, soak, draw, OPTIONS, arguments)


if __name__ == "__main__":
    sys.exit(main())
