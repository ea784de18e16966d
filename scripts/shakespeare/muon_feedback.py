"""Muon with and without error feedback of its steps: the page's section."""

from statistics import mean

from scripts.measuring import markdown
from scripts.shakespeare.findings import filled
from scripts.shakespeare.results import Result
from scripts.shakespeare.settings import FEEDBACK_RADII

WITHOUT = "muon_feedback/without"


def muon_feedback(found: dict[str, Result]) -> str:
    """Nothing where neither has been run."""
    if not found:
        return ""
    return f"""## Muon with error feedback of its steps

"Muon Does Not Converge on Convex Lipschitz Functions" (arXiv:2605.08980) repairs that with error
feedback, and reports that the repair costs accuracy on images and language. It has nothing to do
with compression: of e + lr radius M the part along the LMO's direction is the step, and the rest is
kept (`lmo_feedback`). Here hidden layers do so, by one worker, uncompressed, in half the steps. A
step is then as long as gradients are, so that its radius has a grid of its own, of as many points
as Muon's had. The same on images: [digits](digits/README.md); why it converges:
[theory](theory/README.md).

{feedback_table(found)}

{filled(feedback_text(found))}

"""


def feedback_table(found: dict[str, Result]) -> str:
    """The final loss of every radius."""
    rows = [["hidden layers", "radius", "seeds", "final loss", "over Muon"]]
    muon = found.get(WITHOUT)
    for name, result in found.items():
        with_ = name != WITHOUT
        cells = ["with feedback" if with_ else "Muon", name.partition("-radius")[2] or "2"]
        cells += [str(len(result.logs)), result.final_text]
        cells.append(f"{over(result, muon):+.1f} %" if with_ and muon else "")
        rows.append(cells)
    return markdown(rows, text_columns=1)


def over(result: Result, muon: Result) -> float:
    """Percent of the loss, over those of Muon's seeds that it has too."""
    return 100 * (mean(result.final) / mean(muon.final[: len(result.final)]) - 1)


def best(found: dict[str, Result]) -> Result | None:
    """The radius with the lowest loss at seed 0; None before all of the grid have run."""
    grid = [found.get(f"muon_feedback/with-radius{radius}") for radius in FEEDBACK_RADII]
    return min(grid, key=lambda one: one.final[0]) if all(grid) else None


def feedback_text(found: dict[str, Result]) -> str:
    """Whether the claim holds here; nothing before the grid and Muon have run."""
    muon, chosen = found.get(WITHOUT), best(found)
    if not (muon and chosen):
        return ""
    seeds = min(len(muon.final), len(chosen.final))
    worse = sum(chosen.final[seed] > muon.final[seed] for seed in range(seeds))
    radius = chosen.setting.name.partition("-radius")[2]
    holds = "holds" if worse == seeds else "does not hold"
    end = " (an end of the grid)" if int(radius) in (FEEDBACK_RADII[0], FEEDBACK_RADII[-1]) else ""
    return (
        f"At its best radius, {radius}{end}, Muon with feedback has a final loss "
        f"{over(chosen, muon):+.1f} % from Muon's, and a higher one with {worse} of {seeds} "
        f"seeds: the claim {holds} here. With feedback X - e is the iterate of gradient "
        "descent with momentum, exactly and for any LMO: what Muon does otherwise is in e, and is "
        "taken back."
    )
