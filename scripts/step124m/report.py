"""README.md of scripts/step124m/run.py, from its records alone."""

import shlex

from scripts.studies import markdown
from training.renamed import modern_overrides

# How records and tables name what is not a step of EF21-Muon.
GRADIENT = "gradient"
ADAMW, MUON = "`torch.optim.AdamW`", "`torch.optim.Muon`, one block"


def report(records: list[dict]) -> str:
    facts = records[0]
    script = f"scripts/step124m/run.py --steps={facts['steps']}"
    overrides = shlex.join(modern_overrides(facts["overrides"]))
    return f"""# Time and memory of a step

`torchrun --standalone --nproc_per_node={facts["workers"]} {script} {overrides}`

{facts["workers"]} workers, threads each: {facts["threads"]}; {facts["processor"]}, cores in all:
{facts["cores"]}, shared with other programs; torch {facts["torch"]}. The model has
{facts["parameters"]:,} parameters, its largest layer {facts["largest_layer"]:,}. A worker's
gradient is of one sequence of {facts["context"]} tokens, and every method steps with the same
gradients. What was measured on each rank is in [step124m.jsonl](step124m.jsonl).

## Phases

Seconds are the least of {facts["steps"]} steps, on the slower rank; of the exchange on the one that
waits less. Peak is the most that torch's allocator has handed out, in MB beyond what is there
before the step (parameters, and of optimizers gradients and state): temporaries, and what earlier
phases leave for later ones, as messages. Largest is the largest single tensor, those inside of
operators included, in MB and in float32 copies of the largest layer, with the operator that asked
for it. Both are of the rank where they are larger. What MKL and gloo allocate themselves is not in
them.

{phase_table(records)}

## Whole steps

State: bytes per parameter that stay allocated after the first step, beyond parameters and
gradients. EF21-Muon keeps 8 on every rank, M_j and G_j, and 4 in all ranks together, G; where
messages to the workers are compressed, another 4 in all, X. Servers are placed so that their LMOs
take equally long, and no layer is split, so that ranks differ. torch's optimizers step alone, with
this worker's gradients; `torch.optim.Muon` steps one block of {facts["blocks"]}, and its time is
multiplied. It does not take embeddings.

{step_table(records)}
"""


def by_phase(records: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The records of all ranks, by method and phase."""
    grouped = {}
    for record in records:
        grouped.setdefault((record["method"], record["phase"]), []).append(record)
    return grouped


def seconds(of_ranks: list[dict]) -> float:
    """Of a phase: a rank's time in the exchange is also that of waiting for others."""
    which = min if of_ranks[0]["phase"] == "exchange" else max
    return which(record["seconds"] for record in of_ranks)


def phase_table(records: list[dict]) -> str:
    rows = [["method", "phase", "largest is of", "s", "peak MB", "largest MB", "layers"]]
    for (method, phase), of_ranks in by_phase(records).items():
        if phase == "state":
            continue
        largest = max(of_ranks, key=lambda record: record["largest_bytes"])
        rows.append(
            [
                method,
                phase.replace("_", ", "),
                f"`{largest['largest_operator']}`",
                f"{seconds(of_ranks):.2f}",
                f"{max(record['peak_bytes'] for record in of_ranks) / 1e6:.0f}",
                f"{largest['largest_bytes'] / 1e6:.0f}",
                f"{largest['largest_bytes'] / 4 / largest['largest_layer']:.2f}",
            ]
        )
    return markdown(rows, text_columns=3)


def step_table(records: list[dict]) -> str:
    grouped, blocks = by_phase(records), records[0]["blocks"]
    ranks = [f"state, rank {record['rank']}" for record in grouped[GRADIENT, "forward_backward"]]
    rows = [["method", "s without the exchange", "exchange", *ranks, "mean"]]
    for (method, phase), states in grouped.items():
        if phase != "state":
            continue
        of_phases = {phase: seconds(of) for (name, phase), of in grouped.items()
                     if name == method and phase != "state"}  # fmt: skip
        exchange = of_phases.pop("exchange", None)
        total, name = sum(of_phases.values()), method
        if method == MUON:
            total, name = blocks * total, f"{method}, times {blocks}"
        state = [record["state_bytes"] / record["of_parameters"] for record in states]
        rows.append(
            [
                name,
                f"{total:.2f}",
                "none" if exchange is None else f"{exchange:.2f}",
                *(f"{number:.2f}" for number in (*state, sum(state) / len(state))),
            ]
        )
    return markdown(rows)
