"""What several benchmarks measure with: the ranks of a launch, links of given rates."""

import argparse
import json
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from scripts.netns import Network, requirements_missing
from scripts.studies import read_records, write_records
from training.workers import RunError, Workers, exit_process

UNLIMITED = "unlimited"  # in place of a link's rate
PATIENCE = 3600  # seconds for a job over links


def processor() -> str:
    """The name of this machine's processor, or its architecture where the kernel gives no name."""
    name = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return name[1] if name else platform.machine()


def by_ranks(measure: Callable[[argparse.Namespace, Workers], Iterable[dict]]) -> Callable:
    """What `studies.command` takes to measure by all ranks that torchrun has started.

    `measure` gives the records on every rank. The first rank goes on with them; for the others, and
    after an error, the process ends here.
    """

    def measured(options: argparse.Namespace) -> list[dict]:
        workers, records = Workers(), []
        status = workers.run(lambda: records.extend(measure(options, workers)) or 0)
        if status or not workers.first:
            exit_process(status)
        return records

    return measured


def over_links(
    script: str, nodes: int, rates: Sequence[str], delay: str | None, **given: object
) -> Iterator[dict]:
    """The records of a script that calls `job`, launched once per rate on nodes joined by links.

    A node has one worker of one thread. What is given is for `measure` of the job. Needs root.

    Raises:
        RunError: There can be no such links here, or a job has failed.
    """
    if missing := requirements_missing():
        raise RunError(missing)
    for rate in rates:
        limits = (None, None) if rate == UNLIMITED else (rate, delay)
        with tempfile.TemporaryDirectory() as folder, Network(nodes, *limits) as network:
            path = Path(folder, "records.jsonl")
            options = json.dumps(given | {"rate": rate, "delay": limits[1]})
            try:
                network.torchrun(script, path, options, show=True, timeout=PATIENCE)
            except RuntimeError as error:
                raise RunError(str(error)) from error
            yield from read_records(path)


def job(measure: Callable[[argparse.Namespace, Workers], Iterable[dict]]) -> int:
    """The main program of every rank of `over_links`, which all have to measure the same things."""
    path, options = Path(sys.argv[1]), argparse.Namespace(**json.loads(sys.argv[2]))

    def of_link(options: argparse.Namespace, workers: Workers) -> Iterator[dict]:
        for record in measure(options, workers):
            workers.say(json.dumps(record))
            yield {"rate": options.rate, "delay": options.delay} | record

    write_records(path, by_ranks(of_link)(options))
    return 0
