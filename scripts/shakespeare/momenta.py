"""Kinds of momentum in the study's setting, at as many gradients."""

from statistics import mean

from scripts.measuring import markdown
from scripts.shakespeare.findings import listed
from scripts.shakespeare.results import Result

MESSAGES = ("identity", "fitted9")
# Take two gradients per batch; of the second the correction has a tenth of its weight.
TWICE = {"mvr": "mvr", "mvr0.1": "mvr, gamma 0.1", "hessian": "hessian"}


def momenta_table(found: dict[str, Result], study: dict[str, Result]) -> str:
    """The final loss of every kind and message, by steps and gradients of a batch.

    found: by name; study: the runs of all steps, with Polyak's momentum.
    """
    rows = [["message", "momentum", "steps", "gradients", "final loss"]]
    for name in MESSAGES:
        of_kinds = {"polyak": [study[name]], **{kind: [] for kind in TWICE}}
        for kind, runs in of_kinds.items():
            runs += [found[key] for key in (f"momentum/{kind}-{name}",) if key in found]
            for result in runs:
                steps = result.logs[0].evals[-1]["step"]
                gradients = (2 if kind in TWICE else 1) * steps
                end = f"{mean(result.final):.4f}"
                title = TWICE.get(kind, kind)
                rows.append([study[name].label, title, str(steps), str(gradients), end])
    return markdown(rows, text_columns=2)


def momenta_text(found: dict[str, Result], study: dict[str, Result], changes: list[dict]) -> str:
    """How the corrected kinds do against Polyak's, and why; nothing where it has not run."""
    compared = []
    for name in MESSAGES:
        polyak = found.get(f"momentum/polyak-{name}")
        for kind, title in TWICE.items():
            run = found.get(f"momentum/{kind}-{name}")
            if polyak and run:
                steps, gradients = (
                    f"{100 * (mean(run.final) / mean(other.final) - 1):+.0f} %"
                    for other in (polyak, study[name])
                )
                compared.append(f"{steps} ({gradients}) for {title} with {study[name].label}")
    if not (compared and changes):
        return ""
    hidden = [one for one in changes if one["layer"].startswith("blocks")]
    size, cosine = (mean(one[key] for one in hidden) for key in ("size", "cosine"))
    return (
        "Loss gaps to Polyak's momentum, at as many steps (at as many gradients), are "
        f"{listed(compared)}. At their full weight they lose, and steps of full length are why "
        "(`scripts/shakespeare/changes.py`): in one of them a hidden layer's gradient changes by "
        f"{size:.1f} times its own size, alike for all batches (a cosine of {cosine:.2f}). W goes "
        "to and fro across what is steep; momentum that keeps up follows it there, and the mean of "
        "the last steps' gradients does not."
    )
