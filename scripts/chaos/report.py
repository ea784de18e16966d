"""results/chaos/README.md, from the records of chaos alone."""

from pathlib import Path
from statistics import mean

from scripts.chaos.faults import bound
from scripts.faults import answer, hand_in
from scripts.studies import markdown
from training.config import ROOT

LOG = ROOT / "results" / "chaos" / "chaos.jsonl"


def draw(records: list[dict], folder: Path) -> str:
    return hand_in(*report(records), folder)


def report(records: list[dict]) -> tuple[str, bool]:
    """What happened in sentences, and tables; and whether all held that is asked for."""
    first = records[0]
    faults, rounds, calm = (
        [one for one in records if one["record"] == kind] for kind in ("fault", "round", "calm")
    )
    for place, fault in enumerate(faults):
        fault["promised"] = promised(fault, faults[:place], first["pace"])
    kinds = sorted({one["kind"] for one in faults})
    equal = all(one["equal_at_the_end"] and not one["rounds_with_two_histories"] for one in rounds)
    in_time = all(one["longest_wait"] <= one["promised"] for one in faults)
    losses, without = ([one["test_loss"] for one in some] for some in (rounds, calm))
    among = bool(losses) and min(without) <= mean(losses) <= max(without)
    text = f"""# Chaos

`python scripts/chaos/run.py --seed {first["seed"]}`: {len(faults)} faults of \
{len(kinds)} kinds in {len(rounds)} runs of {first["workers"]} workers that come and go, \
{sum(one["seconds"] for one in rounds) / 60:.0f} minutes.

- W is the same on all workers, bit for bit, before every one of \
{sum(one["rounds_seen"] for one in rounds):,} rounds and at the end: {answer(equal)}.
- No worker to which nothing happened waited longer than promised: {answer(in_time)}.
- The mean test loss, {_losses(losses)}, lies among those of as many runs without \
faults with the same tokens, {_losses(without)} ({len(calm)} seeds): {answer(among)}.

{fault_table(kinds, faults)}

{loss_table(rounds, calm)}

A step takes {first["pace"]:g} s at least, so that {first["workers"]} machines fit on \
one. `kill`: SIGKILL; `lose`: with its torchrun, back later; `preempt`: SIGTERM, back \
later; `stop`: SIGSTOP, later SIGCONT; `hang`: in Python, while it says that it lives; \
`part`: its W becomes another; `lighthouse`: away for a while.
"""
    return text, equal and in_time and among


def fault_table(kinds: list[str], faults: list[dict]) -> str:
    heading = ["times", "longest wait of others, s", "promised, s", "all are back after, s"]
    rows = [["fault", *heading]]
    for kind in kinds:
        of_kind = [one for one in faults if one["kind"] == kind]
        backs = [one["back_after_seconds"] for one in of_kind if one["back_after_seconds"]]
        least, most = (pick(one["promised"] for one in of_kind) for pick in (min, max))
        rows.append(
            [
                kind,
                str(len(of_kind)),
                f"{max(one['longest_wait'] for one in of_kind):.1f}",
                f"{least:.0f} to {most:.0f}" if least < most else f"{least:.0f}",
                f"{mean(backs):.1f}" if backs else "-",
            ]
        )
    return markdown(rows)


def loss_table(rounds: list[dict], calm: list[dict]) -> str:
    rows = [["seed", "tokens", "test loss", "steps without faults", "tokens", "test loss"]]
    for one, other in zip(rounds, calm, strict=False):
        left = [str(one["seed"]), f"{one['tokens']:,}", f"{one['test_loss']:.4f}"]
        right = [f"{other['steps']:,}", f"{other['tokens']:,}", f"{other['test_loss']:.4f}"]
        rows.append([*left, *right])
    return markdown(rows, text_columns=0)


def promised(fault: dict, earlier: list[dict], pace: float) -> float:
    """Seconds that others wait at most for a fault.

    One that hangs ends itself by its longest step, which is as long as it stood still in one.
    """
    stood_still = [
        one["lasts"]
        for one in earlier
        if (one["kind"], one["round"], one["worker"]) == ("stop", fault["round"], fault["worker"])
    ]
    return bound(fault["kind"], fault["lasts"], pace + max(stood_still, default=0.0))


def _losses(losses: list[float]) -> str:
    return f"{mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})" if losses else "none"
