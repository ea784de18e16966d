"""Kinds of momentum in the study's setting, at as many gradients."""

from statistics import mean

from scripts.measuring import markdown
from scripts.shakespeare.results import Result

MESSAGES = ("identity", "fitted9")
TWICE = ("mvr", "hessian")  # take two gradients a batch


def momenta_table(found: dict[str, Result], study: dict[str, Result]) -> str:
    """The loss at the end of every kind and message, by steps and gradients of a batch.

    found: by name; study: the runs of all steps, with Polyak's momentum.
    """
    rows = [["message", "momentum", "steps", "gradients", "end"]]
    for name in MESSAGES:
        of_kinds = {"polyak": [study[name]], **{kind: [] for kind in TWICE}}
        for kind, runs in of_kinds.items():
            runs += [found[key] for key in (f"momentum/{kind}-{name}",) if key in found]
            for result in runs:
                steps = result.logs[0].evals[-1]["step"]
                gradients = (2 if kind in TWICE else 1) * steps
                end = f"{mean(result.final):.4f}"
                rows.append([study[name].label, kind, str(steps), str(gradients), end])
    return markdown(rows, text_columns=2)


def momenta_told(found: dict[str, Result], study: dict[str, Result]) -> str:
    """How the corrected kinds end against Polyak's, at as many steps and at as many gradients."""
    told = []
    for name in MESSAGES:
        runs = {kind: found.get(f"momentum/{kind}-{name}") for kind in ("polyak", *TWICE)}
        if all(runs.values()):
            half, whole = (mean(result.final) for result in (runs["polyak"], study[name]))
            gaps = (
                f"{kind} {100 * (mean(runs[kind].final) / half - 1):+.1f} % over as many steps and "
                f"{100 * (mean(runs[kind].final) / whole - 1):+.1f} % over as many gradients"
                for kind in TWICE
            )
            told.append(f"{study[name].label}: {', '.join(gaps)}")
    return f"Against Polyak's momentum, {'; '.join(told)}." if told else ""
