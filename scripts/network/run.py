"""Step times over slow links: EF21-Muon beside DDP, on nodes joined at a given rate.

    python scripts/network/run.py [--rates 100mbit,1gbit] [--nodes 2] [--steps 3] [KEY=VALUE ...]

Needs root on Linux and iproute2 (scripts/netns.py). Every node is a namespace with one worker of
one thread. The model is the tiny one widened to 9.7 M parameters; a method's time to communicate is
what a step takes beyond the same step without the network: for EF21-Muon the time in its exchange,
for DDP the step time less that of the same steps under `no_sync`. `--redraw` draws the picture and
the table again from network.jsonl.
"""

import argparse
import json
import os
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

from scripts.measuring import WARM_UP, time_steps
from scripts.netns import Network, requirements_missing
from train import Run
from training.config import ROOT, compose
from training.drawing import Figure, matplotlib
from training.picture import COLOURS, STYLE, save
from training.workers import Workers, exit_process

OUTPUT = ROOT / "results" / "network"
WIDTH = 448
MODEL = [f"model.width={WIDTH}", "model.heads=4", "batch.micro_size=1", "schedule.cooldown=0"]
RANK = 0.15
DDP = {
    "DDP + Muon": ["optimizer=muon"],
    f"DDP + PowerSGD rank {RANK:.0%} + Muon":
        ["optimizer=muon_powersgd", f"optimizer.rank={round(RANK * WIDTH)}"],
}  # fmt: skip
LEVELS = {
    "identity": ["compressor@w2s=identity"],
    "rank 15% natural": ["compressor@w2s=rank", f"w2s.fraction={RANK}"],
    "rank 5% natural4": ["compressor@w2s=rank", "w2s.fraction=0.05", "w2s.values=natural4"],
    "top 5% natural4": ["compressor@w2s=topk", "w2s.fraction=0.05", "w2s.values=natural4"],
}
BACK = ["compressor@s2w=rank", "s2w.fraction=0.15"]
METHODS = {
    **{f"{level}, {server}": [*how, f"optimizer.server={server}"]
       for level, how in LEVELS.items() for server in ("sharded", "replicated")},
    "rank 15% natural both ways, sharded": [*LEVELS["rank 15% natural"], *BACK],
    "rank 15% natural both ways, sharded, 1 bucket":
        [*LEVELS["rank 15% natural"], *BACK, "optimizer.buckets=1"],
    "rank 15% natural, replicated, 1 bucket":
        [*LEVELS["rank 15% natural"], "optimizer.server=replicated", "optimizer.buckets=1"],
}  # fmt: skip


def overrides(options: argparse.Namespace, *method: str) -> tuple[str, ...]:
    """One sequence per worker, and as many steps as are taken: DDP warms up and is timed twice."""
    steps = WARM_UP + 2 * options.steps
    return (*MODEL, f"batch.global_size={options.nodes}", f"steps={steps}",
            *options.overrides, *method)  # fmt: skip


def time_ef21(options: argparse.Namespace, workers: Workers, method: list[str]) -> dict:
    """Seconds and bytes per step of EF21-Muon."""
    run = Run(compose(overrides(options, *method)).config, workers)
    run.step()
    run.optimizer.timer.read()
    phases = []
    seconds, sent = time_steps(
        run, options.steps, lambda: phases.append(run.optimizer.timer.read())
    )
    exchange = [phase["exchange"] for phase in phases]
    return {
        "seconds": seconds,
        "communication": exchange,
        "compute": seconds - sum(exchange) / options.steps,
        "bytes": sent,
        "tokens": run.tokens_per_step,
    }


def time_ddp(options: argparse.Namespace, workers: Workers, method: list[str]) -> dict:
    """Seconds and bytes per step of a baseline behind DDP."""
    run = Run(compose(overrides(options, *method)).config, workers)
    for _ in range(WARM_UP):
        run.step()
    seconds, sent = time_steps(run, options.steps)
    with run.gradients.without_sync():
        compute, _ = time_steps(run, options.steps)
    return {
        "seconds": seconds,
        "communication": [seconds - compute],
        "compute": compute,
        "bytes": sent,
        "tokens": run.tokens_per_step,
    }


def job(options: argparse.Namespace, workers: Workers) -> int:
    """On every node: time all methods; rank 0 writes them, in the order given."""
    timed = [(name, lambda m=m: time_ddp(options, workers, m)) for name, m in DDP.items()]
    timed += [(name, lambda m=m: time_ef21(options, workers, m)) for name, m in METHODS.items()]
    for name, measure in timed:
        record = {"rate": options.rates, "nodes": options.nodes, "method": name} | measure()
        every = [None] * workers.count
        dist.all_gather_object(every, record["communication"])
        # The rank that comes last to a step waits least: its time is the network's.
        of_step = [min(ranks) for ranks in zip(*every, strict=True)]
        record["communication"] = sum(of_step) / len(of_step)
        workers.say(f"{options.rates:>8}  {name:<48} {record['seconds']:.2f} s per step, "
                    f"{record['communication']:.2f} s of it communicating")  # fmt: skip
        if workers.first:
            with (options.out / "network.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
    return 0


def read(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "network.jsonl").read_text().splitlines()]


def write_table(records: list[dict], directory: Path) -> None:
    """README.md: one table a rate."""
    text = [
        "# Step times over slow links\n",
        "`sudo python scripts/network/run.py`: nodes are network namespaces of one machine, one",
        "worker of one thread each; 9.7 M parameters, a sequence of 256 tokens per worker "
        "and step.",
        "Communicating: the exchange of EF21-Muon, on the rank that waits least in each step, or",
        "what a DDP step takes beyond the same step under `no_sync`. MB are what a rank hands to",
        "the network (DDP: of a ring all-reduce). DDP's time is a difference of two measurements",
        "and as noisy as the machine; where it is below 0, it is lost in that noise.\n",
    ]
    for rate in dict.fromkeys(record["rate"] for record in records):
        of_rate = [record for record in records if record["rate"] == rate]
        base = of_rate[0]["communication"]
        text += [
            f"## {rate}, {of_rate[0]['nodes']} nodes\n",
            "| method | MB per step | s per step | communicating | less than DDP + Muon "
            "| tokens/s |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *(
                f"| {r['method']} | {r['bytes'] / 1e6:.2f} | {r['seconds']:.2f} | "
                f"{r['communication']:.3f} | {ratio(base, r['communication'])} | "
                f"{r['tokens'] / r['seconds']:.0f} |"
                for r in of_rate
            ),
            "",
        ]
    (directory / "README.md").write_text("\n".join(text))


def ratio(base: float, seconds: float) -> str:
    """How often `seconds` goes into `base`; a difference within the noise has no ratio."""
    return f"{base / seconds:.1f}x" if seconds > 0.001 else "-"


def draw(records: list[dict], directory: Path) -> None:
    """network.png and .svg: a bar a method and rate, computing and communicating."""
    rates = list(dict.fromkeys(record["rate"] for record in records))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        for axes, rate in zip(figure.subplots(1, len(rates), sharey=True, squeeze=False)[0], rates,
                              strict=True):  # fmt: skip
            of_rate = [record for record in records if record["rate"] == rate][::-1]
            names = [record["method"] for record in of_rate]
            compute = [record["compute"] for record in of_rate]
            waiting = [max(0, record["seconds"] - record["compute"]) for record in of_rate]
            axes.barh(names, compute, color=COLOURS[6], label="computing")
            axes.barh(names, waiting, left=compute, color=COLOURS[1], label="communicating")
            axes.set(title=rate, xlabel="seconds per step", axisbelow=True)
            axes.grid(axis="y", visible=False)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False)
    save(figure, directory / "network")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--rates", default="100mbit,1gbit", help="(default %(default)s)")
    parser.add_argument("--nodes", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder (default %(default)s)")
    parser.add_argument("--redraw", action="store_true", help="from network.jsonl")
    options = parser.parse_intermixed_args()
    if "RANK" in os.environ:
        workers = Workers()
        return workers.run(lambda: job(options, workers))
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.redraw:
        if missing := requirements_missing():
            print(f"error: {missing}", file=sys.stderr)
            return 1
        (options.out / "network.jsonl").unlink(missing_ok=True)
        for rate in options.rates.split(","):
            own = [f"--rates={rate}", f"--nodes={options.nodes}", f"--steps={options.steps}"]
            with Network(options.nodes, rate) as network:
                network.torchrun(__file__, *own, f"--out={options.out.resolve()}",
                                 *options.overrides, show=True, timeout=1200)  # fmt: skip
    records = read(options.out)
    write_table(records, options.out)
    draw(records, options.out)
    return 0


if __name__ == "__main__":
    exit_process(main())
