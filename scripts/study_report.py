"""results/README.md: the study in words and tables, from its logs."""

from statistics import mean, stdev

from scripts.study_findings import findings
from scripts.study_results import TARGET_SHARE, Result, savings, target_loss
from scripts.study_runs import SETTINGS

RIVALS = ("Muon + PowerSGD", "Dion", "Dion float32", "DeMo")
MORE_BITS = 1.01


def report(results: dict[str, Result], replayed: dict[str, dict]) -> str:
    """The page. What it says in numbers is computed; the rest was written by looking at them."""
    identity = results["identity"]
    target = target_loss(identity)
    run, last = identity.logs[0].run, identity.logs[0].evals[-1]
    parameters, steps, tokens = run["parameters"], last["step"], last["tokens"]
    return f"""# Results

The study of the method on one machine is below. Beside it: [theory](theory/README.md) (both
theorems beside measured runs), [network](network/README.md) (step times over slow links),
[codec](codec/README.md) (what each compressor costs and loses), [lmo](lmo/README.md) (what an LMO
costs), [step124m](step124m/README.md) (time and memory of a step of the paper's model),
[soak](soak/README.md) (30 faults).
`make figures` redraws all but `lmo` from their logs.

{headline(results)}

## Setting

A GPT of {parameters:,} parameters on bytes of Shakespeare's plays, two workers, {steps} steps
of {tokens // steps:,} tokens, {tokens / 1e6:.2f} M in all; test loss in nats a byte on the same
65,536 bytes each time. Two CPU cores, torch {run["versions"]["torch"]}. `make study` runs it, or
what is missing of it; the runs are listed in `scripts/study_runs.py`, their logs in `shakespeare/`,
cut to the records that are used here.

Radii and beta were tuned for the uncompressed run and hold for everything else that takes
EF21-Muon's step, as in the paper. Runs with momentum at the server have the same radii, but beta 1,
a momentum of 0.7 and a decay of the error of 0.92, which were chosen at rank 3 % by a few runs of
half the steps that were not kept, as was that the embedding needs a larger rank.
Baselines with other steps have learning rates of their own (last table). The target was fixed
before the runs: the uncompressed run's test loss at {TARGET_SHARE:.0%} of its tokens, mean of its
seeds, is **{target:.4f}**. Bytes are what one worker sends to the servers, in sizes of the model (4
bytes a parameter).

![The paper's four panels](shakespeare/paper.png)

![Test loss against bytes](shakespeare/bytes.png)

![Rate against final loss](shakespeare/rate.png)

![Bytes of each method](shakespeare/methods.png)

![Time over slow links](shakespeare/time.png)

![Both directions](shakespeare/directions.png)

## What the runs say

{findings(results, target, replayed)}

![Why compression costs loss](shakespeare/why.png)

Limits: a model of 0.8 M parameters and a text of 1 MB, two workers, bytes for tokens, the steps of
one learning-rate schedule, a CPU. Settings with one seed carry its noise; the table has the spread
where there are three.

## At the rates of other methods

Beside every run of another method that compresses, the one of ours with the lowest loss at the end
among those that send no more than {MORE_BITS - 1:.0%} more.

{rivals_table(results)}

## All settings

± is one standard deviation over seeds.

{table(results, target)}
{missing(results)}
## Grids

{grid_table(results)}
"""


def headline(results: dict[str, Result]) -> str:
    """The README's first number: the smallest message to the target, and the closest final loss."""
    saved = savings(results, target_loss(results["identity"]))
    fewest = max(saved, key=saved.__getitem__)
    close = [
        result
        for result in results.values()
        if result.setting.family not in ("grid", "identity") and result.bits < 3.2
    ]
    closest = min(close, key=lambda result: mean(result.final))
    return (
        "To the loss that the uncompressed run has at 75 % of its tokens, "
        f"{results[fewest].short} takes {saved[fewest]:.0f} times fewer bytes than it; at the "
        f"end, {closest.short}, which sends {results['identity'].bits / closest.bits:.0f} times "
        f"fewer, differs from it by {closest.over(results['identity']):+.2f} % in test loss."
    )


def missing(results: dict[str, Result]) -> str:
    """What of the study has not been run."""
    left = []
    for setting in SETTINGS:
        done = len(results[setting.name].logs) if setting.name in results else 0
        if done < len(setting.seeds):
            left.append(f"{setting.name} ({len(setting.seeds) - done})" if done else setting.name)
    return f"\nNot run yet (`make study` does): {', '.join(left)}.\n" if left else ""


def table(results: dict[str, Result], target: float) -> str:
    """Every setting: rate, final loss, and what it takes to the target."""
    saved = savings(results, target)
    lines = [
        "| setting | seeds | bits a parameter and step | final test loss | over uncompressed "
        "| tokens to target | bytes / model size to target | fewer than uncompressed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, result in results.items():
        if result.setting.family == "grid":
            continue
        final = f"{mean(result.final):.4f}"
        if len(result.final) > 1:
            final += f" ± {stdev(result.final):.4f}"
        reached = ["not reached", "", ""]
        if name in saved:
            points = result.reach(target)
            reached = [
                f"{mean(point.tokens for point in points) / 1e6:.2f} M",
                f"{result.sent(target):.2f}",
                f"{saved[name]:.1f}x",
            ]
        over = f"{result.over(results['identity']):+.2f} %"
        cells = [result.label, str(len(result.logs)), f"{result.bits:.3g}", final, over, *reached]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rivals(results: dict[str, Result]) -> dict[str, str]:
    """Of every run of another method that compresses, the best of ours up to its rate, by name."""
    others = [result for result in results.values() if result.setting.family in RIVALS]
    ours = [
        result
        for result in results.values()
        if result.setting.family not in ("grid", "Muon", "AdamW", *RIVALS)
    ]
    found = {}
    for other in others:
        near = [result for result in ours if result.bits <= MORE_BITS * other.bits]
        if near:
            best = min(near, key=lambda result: mean(result.final))
            found[other.setting.name] = best.setting.name
    return found


def rivals_table(results: dict[str, Result]) -> str:
    """What `rivals` finds: bits a parameter and step, losses over the uncompressed run's."""
    lines = [
        "| other method | bits | at the end | ours | bits | at the end |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for pair in rivals(results).items():
        cells = []
        for result in (results[name] for name in pair):
            over = result.over(results["identity"])
            cells += [result.label, f"{result.bits:.3g}", f"{over:+.2f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grid_table(results: dict[str, Result]) -> str:
    """The grids by which radii and learning rates were chosen."""
    rows = [
        f"| {name.removeprefix('grid/')} | {result.final[0]:.4f} |"
        for name, result in results.items()
        if result.setting.family == "grid"
    ]
    return "\n".join(["| grid point, half the steps | final test loss |", "| --- | ---: |", *rows])
