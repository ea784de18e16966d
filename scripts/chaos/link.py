"""Workers that come and go over slow links: one is cut off twice, and the others continue.

    sudo python scripts/chaos/link.py [KEY=VALUE ...]

Three nodes, which are network namespaces of this machine (scripts/netns.py), at 10 Mbit/s with 50
ms from node to node. Records go to results/chaos/link.jsonl, and into README.md beside it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.chaos.crew import Crew
from scripts.chaos.outcome import longest_wait, outcome
from scripts.netns import Network, requirements_missing
from training.config import ROOT

OUTPUT = ROOT / "results" / "chaos" / "link.jsonl"
RATE, DELAY = "10mbit", "50ms"
EVERY = 20
MODEL = [
    *("model.layers=1", "model.width=128", "model.heads=2", "model.context=32"),
    *("batch.global_size=6", "batch.micro_size=2", "eval.tokens=4096"),
    *("optimizer=local", f"optimizer.sync_every={EVERY}", "steps=900"),
    *("eval.every=300", "log_every=100", "checkpoint.every=300", "check_every=0"),
]
CUT_OFF, SECONDS = 1, 20  # which worker, twice for how long
PORT = 29510


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUTPUT, help="(default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    options = parser.parse_args()
    if missing := requirements_missing():
        print(f"error: {missing}", file=sys.stderr)
        return 1
    records = [{"record": "link", "rate": RATE, "delay": DELAY, "workers": 3}]
    with (
        tempfile.TemporaryDirectory(prefix="ef21-link-") as folder,
        Network(3, rate=RATE, delay=DELAY) as network,
    ):
        overrides = [*MODEL, *options.overrides]
        crew = Crew(3, PORT, Path(folder, "run"), overrides, 0.1, network)
        try:
            for _ in range(2):
                crew.wait_until_all_meet(crew.last_step() + 2 * EVERY)
                before, start = crew.last_step(), time.monotonic()
                link(network, "down")
                time.sleep(SECONDS)
                link(network, "up")
                during = crew.last_step()
                crew.wait_until_all_meet(during + 2 * EVERY)
                fault = {"kind": "cut", "worker": CUT_OFF, "lasts": SECONDS, "step": before}
                fault |= {
                    "until_step": crew.last_step(),
                    "rounds_without": (during - before) // EVERY,
                }
                fault["back_after_seconds"] = round(time.monotonic() - start, 1)
                records.append({"record": "fault", **fault, **longest_wait(crew, fault)})
                print(json.dumps(records[-1]), flush=True)
            crew.wait_until_all_end()
            records.append({"record": "round", "seed": 0, **outcome(crew)})
        finally:
            crew.close()
    options.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(json.dumps(records[-1]))
    return 0


def link(network: Network, state: str) -> None:
    """Of the node that is cut off."""
    name = network.names[CUT_OFF]
    subprocess.run(["ip", "-n", name, "link", "set", "eth0", state], check=True)


if __name__ == "__main__":
    sys.exit(main())
