"""Runs of other methods beside the best of ours that sends as much: tables of the page."""

from collections.abc import Callable, Container, Iterable

from scripts.shakespeare.results import PEERS, Result, compressed, lowest, ours
from scripts.shakespeare.rounds import all_of, in_figures

OF_ONE_STEP = ("Muon + PowerSGD", "Muon + GreedyLore", "Dion", "Dion float32", "DeMo")
OF_ROUNDS = (*PEERS, "DeMo")
MORE = 1.01  # times what the other one sends


def rivals(
    results: dict[str, Result],
    families: Container[str],
    of_ours: Iterable[Result],
    amount: Callable[[Result], float],
) -> dict[str, str]:
    """Of every run of the families the best of ours that sends MORE times as much at most."""
    of_ours, found = list(of_ours), {}
    for other in (one for one in results.values() if one.setting.family in families):
        near = [one for one in of_ours if amount(one) <= MORE * amount(other)]
        if near:
            found[other.setting.name] = lowest(near).setting.name
    return found


def at_their_rate(results: dict[str, Result]) -> dict[str, str]:
    """Of methods that sync every step, by bits to the servers."""
    of_ours = [results["identity"], *compressed(results)]
    return rivals(results, OF_ONE_STEP, of_ours, lambda one: one.bits)


def at_their_bytes(results: dict[str, Result]) -> dict[str, str]:
    """Of methods of local steps and of DeMo, by what is sent and received."""
    return rivals(results, OF_ROUNDS, ours(results), all_of)


def rivals_table(results: dict[str, Result]) -> str:
    """Bits per parameter and step, and loss gaps."""
    pairs = at_their_rate(results)
    return _table(results, pairs, "bits", lambda one: f"{one.bits:.3g}")


def peers_table(results: dict[str, Result]) -> str:
    """All that is sent and received, x model size, and loss gaps."""
    pairs = at_their_bytes(results)
    return _table(results, pairs, "x model size", lambda one: in_figures(all_of(one)))


def _table(
    results: dict[str, Result], pairs: dict[str, str], what: str, in_words: Callable[[Result], str]
) -> str:
    lines = [
        f"| other method | {what} | loss gap | ours | {what} | loss gap |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for other, best in pairs.items():
        name = results[other].short if results[other].setting.family in PEERS else None
        cells = []
        for result in (results[other], results[best]):
            over = result.over(results["identity"])
            cells += [result.label, in_words(result), f"{over:+.2f} %"]
        lines.append(f"| {' | '.join([name or cells[0], *cells[1:]])} |")
    return "\n".join(lines)
