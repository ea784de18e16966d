"""results/README.md: page.md with numbers from the logs, at which its words were written."""

from collections.abc import Callable
from pathlib import Path

from scripts.shakespeare import results as study
from scripts.shakespeare.results import BOTH, SENT, Result, Results
from scripts.shakespeare.runs import STUDY
from scripts.shakespeare.tables import tables
from scripts.studies import fill

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

    return {word: of_run(say) for word, say in WORDS.items()}


WORDS: dict[str, Callable[[Result], str]] = {
    "loss": lambda one: f"{one.loss:.4f}",
    "loss_of_seeds": lambda one: one.loss_text,
    "gap": lambda one: f"{round(one.gap, 1) + 0.0:+.1f} %",  # which is never -0.0
    "gap2": lambda one: f"{one.gap:+.2f} %",
    "target": lambda one: f"{one.target:.4f}",
    "bits": lambda one: f"{one.bits:.2g} bits",
    "sizes": lambda one: f"{one.moved:.3g}",
    "times": lambda one: f"{one.times_fewer:,.0f}",
    "times_to_target": lambda one: f"{one.times_to_target(BOTH):,.0f}",
    "fewer": lambda one: f"{times:.1f}x" if (times := one.times_to_target(SENT)) else "(never)",
    "label": lambda one: one.label,
    "message": lambda one: in_words(one.label),
    "seeds": lambda one: str(len(one.logs)),
    "steps": lambda one: f"{one.last['step']:,}",
    "tokens": lambda one: f"{one.last['tokens'] / 1e6:.2f} M",
    "tokens_per_step": lambda one: f"{one.last['tokens'] // one.last['step']:,}",
    "parameters": lambda one: f"{one.run['parameters']:,}",
    "torch": lambda one: one.run["versions"]["torch"],
}


def in_words(label: str) -> str:
    """A label, but for signs in words that a reader knows."""
    message, sync, rest = label.partition(", sync")
    scale = {"sign, hidden sign@tensor": "layer", "sign": "row"}.get(message)
    return f"a message of signs with a scale per {scale}{sync}{rest}" if scale else label


def sentences(results: Results) -> dict[str, str]:
    """What is said of no run that page.md names."""
    lossless = [
        f"{one.label} {one.loss_text} ({one.times_fewer:,.0f} times fewer)"
        for one in study.ours(results)
        if len(one.logs) > 1 and one.gap <= 1
    ]
    ahead = [
        f"{name} from {first:.2g} to {last:.2g} x model size"
        for name, first, last in study.ahead(results)
    ]
    return {
        "more": f"{study.MORE - 1:.0%}",
        "ahead": "; ".join(ahead) or "nowhere",
        "lossless": "; ".join(lossless) or "none",
        "missing": missing(results),
    }


def missing(results: Results) -> str:
    """What of the study has not been run."""
    left = []
    for one in (one for settings in STUDY.values() for one in settings):
        done = len(results[one.name].logs) if one.name in results else 0
        if done < len(one.seeds):
            left.append(f"{one.name} ({len(one.seeds) - done})" if done else one.name)
    return ", ".join(left) or "nothing"
