"""The faults of a soak: which, when, and what each does to a run."""

import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from scripts.netns import MTU, Network
from scripts.soak.disk import Disk
from scripts.soak.job import Job
from scripts.soak.outcome import is_whole
from training.log import completed
from training.records import LOG_NAME

TIMEOUT = 8  # train.py's: seconds that a worker waits for another
TELLING = r"(?:error: |ignored a damaged checkpoint|stopped as asked|resuming from)[^\r\n]*"
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


class Soak:
    """Rounds of the run that `arguments` configure, and the faults in them: `records`, one a fault.

    It lies in `directory`, what its workers write is added to `output`. No fault begins after so
    many minutes. A kind of fault is a method: it gets the job and the fault's draw, and says
    whether it happened.
    """

    def __init__(
        self,
        network: Network,
        disk: Disk,
        output: Path,
        arguments: list[str],
        draws: list[dict],
        minutes: float,
    ):
        self.network, self.disk, self.output, self.draws = network, disk, output, draws
        self.directory = disk.path / "run"
        self.arguments = [*arguments, f"directory={self.directory}", f"--timeout={TIMEOUT}"]
        self.records: list[dict] = []
        self.launches, self._settled = 0, 0
        self.start, self.last_start = time.monotonic(), 60 * minutes

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
                raise RuntimeError(f"{self.launches} launches do not get on: {self.news()}")
            job = Job(self.network, self.output, self.arguments)
            try:
                while number and self.due() and self.moment(job):
                    self.inject(job, number)
                job.wait()
            finally:
                job.kill()
        self.settle()

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
        return self.errors(1)

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
