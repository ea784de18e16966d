"""What the page says of time over slow links is recomputed here from the measured steps."""

import json
import re
from collections import defaultdict

import numpy as np

from scripts.shakespeare import run as study
from scripts.shakespeare.results import read

LINKS = {"10mbit": 0, "100mbit": 1, "1gbit": 2}  # columns
FREE = "no limit, no delay"


def test_steps_over_a_slow_link_are_compared_within_a_repeat():
    lines = (study.RESULTS / "network.jsonl").read_text().splitlines()
    seconds = defaultdict(list)
    for record in map(json.loads, lines):
        seconds[record["name"], record["rate"]].append(record["seconds"])
    text = (study.RESULTS.parent / "README.md").read_text()
    section = text.split("## Time to the target")[1].split("\n## ")[0]
    listed = " ".join(section.split("|")[0].split()).rpartition("or more: ")[2]
    close = listed.removesuffix(".").split("; ")
    labels = {name: result.label for name, result in read(study.RESULTS).items()}
    compared = 0
    for (name, rate), over in seconds.items():
        if rate == FREE:
            continue
        row = next(line for line in section.splitlines() if line.startswith(f"| {labels[name]} |"))
        cell = row.split(" | ")[1 + LINKS[rate]]
        number, repeats = re.search(r"\(([\d.]+)x of (\d+)\)", cell).groups()
        pairs = np.array(over) / np.array(seconds[name, FREE][: len(over)])
        assert int(repeats) == len(over)
        assert float(number) == round(float(np.median(pairs)), 2)
        if rate == "10mbit":
            assert (labels[name] in close) == (np.median(pairs) <= 1.05 and len(over) >= 3)
        compared += 1
    assert compared >= 30
