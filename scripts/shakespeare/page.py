"""results/README.md: page.md with numbers from the logs, at which its words were written."""

from collections.abc import Callable
from pathlib import Path

from scripts.shakespeare import results as study
from scripts.shakespeare.results import BOTH, SENT, Result, Results
from scripts.shakespeare.runs import STUDY
from scripts.shakespeare.tables import THEIRS, over_muon, tables
from scripts.studies import fill, wrapped

TEXT = Path(__file__).with_name("page.md")


def page(results: Results) -> str:
    """All of it. Raises ValueError where page.md names a run that has not been made."""
    return fill(TEXT.read_text(), tables(results) | sentences(results) | words(results))


def words(results: Results) -> dict[str, Callable[[str], str]]:
    """What a word of page.md says of a run, or of the closest or the fewest of ours."""
    named = results | {"closest": study.closest(results), "fewest": study.fewest(results)}

    def of_run(say: Callable[[Result], str]) -> Callable[[str], str]:
        def say_of(name: str) -> str:
            if name not in named:
                raise ValueError(f"page.md names {name}, which has not run: start run.py")
            return say(named[name])

        return say_of

    return {word: of_run(say) for word, say in {**LOSSES, **AMOUNTS, **FACTS}.items()} | {
        "ef21_gap": lambda place: ef21_gap(lambda rule: results[rule].loss, place),
        "their_ef21_gap": lambda place: ef21_gap(lambda rule: THEIRS[rule][-1], place),
        "gap_at_gradients": lambda name: percent(
            results[name].loss / results[name.rpartition("-")[2]].loss, ".0f"
        ),
    }


def percent(ratio: float, form: str = ".1f") -> str:
    """Over 1, with a sign."""
    return f"{100 * (ratio - 1):+{form}} %"


LOSSES: dict[str, Callable[[Result], str]] = {
    "loss": lambda one: f"{one.loss:.4f}",
    "loss_of_seeds": lambda one: one.loss_text,
    "gap0": lambda one: f"{one.gap:+.0f} %",
    "gap": lambda one: f"{round(one.gap, 1) + 0.0:+.1f} %",  # which is never -0.0
    "gap2": lambda one: f"{one.gap:+.2f} %",
    "over_muon": lambda one: f"{over_muon(one):+.1f} %",
    "seeds_above_muon": lambda one: f"{seeds_above(one)} of {len(one.ends)}",
    "target": lambda one: f"{one.target():.4f}",
}
AMOUNTS: dict[str, Callable[[Result], str]] = {
    "bits": lambda one: f"{one.bits:.2g} bits",
    "sizes": lambda one: f"{one.moved:.3g}",
    "times": lambda one: f"{one.times_fewer:,.0f}",
    "times_to_target": lambda one: f"{one.times_to_target(BOTH):,.0f}",
    "fewer": lambda one: f"{times:.1f}x" if (times := one.times_to_target(SENT)) else "(never)",
}
FACTS: dict[str, Callable[[Result], str]] = {
    "label": lambda one: one.label,
    "message": lambda one: in_words(one.label),
    "seeds": lambda one: str(len(one.logs)),
    "steps": lambda one: f"{one.last['step']:,}",
    "tokens": lambda one: f"{one.last['tokens'] / 1e6:.2f} M",
    "tokens_per_step": lambda one: f"{one.last['tokens'] // one.last['step']:,}",
    "parameters": lambda one: f"{one.run['parameters']:,}",
    "torch": lambda one: one.run["versions"]["torch"],
}


def seeds_above(one: Result) -> int:
    """With how many seeds it ends above its baseline."""
    return sum(mine > theirs for mine, theirs in zip(one.ends, one.baseline.ends, strict=False))


def ef21_gap(loss: Callable[[str], float], place: str) -> str:
    """Of signs before or after the LMO: the loss with EF21 over that without feedback."""
    return percent(loss(f"signs/{place}-ef21") / loss(f"signs/{place}-none"))


def in_words(label: str) -> str:
    """A label, but for signs in words that a reader knows."""
    first, *rest = label.split(", sync", 1)
    scale = {"sign, hidden sign@tensor": "layer", "sign": "row"}.get(first)
    first = f"a message of signs with a scale per {scale}" if scale else first
    return ", sync".join([first, *rest])


def sentences(results: Results) -> dict[str, str]:
    """What is said of no run that page.md names."""
    lossless = [
        f"{one.label} {one.loss_text} ({one.times_fewer:,.0f} times fewer)"
        for one in study.ours(results)
        if len(one.logs) > 1 and one.gap <= 1
    ]
    return {
        "more": f"{study.MORE - 1:.0%}",
        "ahead": wrapped(where_others_are_ahead(results)),
        "lossless": "; ".join(lossless) or "none",
        "missing": wrapped(missing(results)),
    }


def where_others_are_ahead(results: Results) -> str:
    """A sentence on the envelopes."""
    found = study.ahead(results)
    if not found:
        return "At no number of bytes, sent and received, is another method's loss below ours."
    others = [f"{name} {span(first, last)} x model size" for name, first, last in found]
    return (
        "By bytes sent and received, the lowest loss so far is another method's here: "
        f"{'; '.join(others)}. Everywhere else it is ours."
    )


def span(first: float, last: float) -> str:
    """From one size to another, in two figures: envelopes are compared at points between."""
    first, last = f"{first:.2g}", f"{last:.2g}"
    return f"at {first}" if first == last else f"from {first} to {last}"


def missing(results: Results) -> str:
    """What of the study has not been run."""
    left = []
    for one in (one for settings in STUDY.values() for one in settings):
        done = len(results[one.name].logs) if one.name in results else 0
        if done < len(one.seeds):
            left.append(f"{one.name} ({len(one.seeds) - done})" if done else one.name)
    return f"Not run yet (`make study` does): {', '.join(left)}." if left else "All of it has run."
