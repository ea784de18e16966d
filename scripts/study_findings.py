"""What the study found, in words whose numbers come from its logs."""

import textwrap
from collections.abc import Iterable, Sequence
from statistics import correlation, mean

from scripts.study_results import Result, savings


def findings(results: dict[str, Result], target: float, replayed: dict[str, dict]) -> str:
    """A paragraph for each thing that was found, where all runs that it speaks of are done."""
    saved = savings(results, target)

    def gap(*names: str) -> str:
        """Final losses over the uncompressed run's."""
        over = [results[name].over(results["identity"]) for name in names]
        return listed(f"{round(percent, 1) + 0.0:+.1f} %" for percent in over)

    def bits(name: str) -> str:
        return f"{results[name].bits:.2g} bits"

    def fewer(*names: str) -> str:
        """How many times fewer bytes than the uncompressed run they take to the target."""
        return listed(f"{saved[name]:.1f}x" if name in saved else "(never)" for name in names)

    ranks, tops = ("rank20", "rank15", "rank10", "rank5"), ("top20", "top15", "top10", "top5")
    fitted = ("fitted30", "fitted12", "fitted9")
    served = ("served3", "served6", "served12")
    near, nearer = "rank30-int5", "rank40-int5"
    muon, power, dion, demos = "muon", "powersgd16", "dion15-normal4", ("demo128", "demo32")
    found = {
        ranks: lambda: (
            "**As in the paper**, the lower the rank, the fewer bytes to the target, until it is"
            " not reached within the budget. In float32, rank 20, 15, 10 and 5 % save"
            f" {fewer(*ranks)}, and their losses at the end are {gap(*ranks)} over the"
            " uncompressed run's."
        ),
        tops: lambda: (
            f"**Top k** of 20, 15, 10 and 5 % in float32 saves {fewer(*tops)} and ends at"
            f" {gap(*tops)}."
        ),
        ("natural", "rank15-natural", "rank15"): lambda: (
            f"**Natural values** of all entries ({bits('natural')}) save {fewer('natural')} and end"
            f" at {gap('natural')}. Those of the factors of rank 15 % save"
            f" {fewer('rank15-natural')} and end at {gap('rank15-natural')}, where float32 factors"
            f" end at {gap('rank15')}: unbiased rounding of both is not for free."
        ),
        (*fitted, "rank10-int5"): lambda: (
            "**Beyond the paper**: a longer factor in 2 bits and a shorter one in 4, fitted to it"
            f" (`fitted_rank`), save {fewer(*fitted)} at rank 30, 12 and 9 % and end at"
            f" {gap(*fitted)}. At {bits('fitted12')} a parameter and step they lose what rank 10 %"
            f" in 5-bit integers loses at {bits('rank10-int5')} ({gap('rank10-int5')})."
        ),
        (near, nearer): lambda: (
            f"**Next to nothing is lost** from about 3 bits on: rank 40 % in 5-bit integers"
            f" ({bits(nearer)}, {fewer(nearer)}) ends at {gap(nearer)}, rank 30 %"
            f" ({bits(near)}, {fewer(near)}) at {gap(near)}."
        ),
        ("fitted12", "fitted12-both", "fitted12-dense"): lambda: (
            "**Back to the workers** low rank fails: rank 12 % in both directions ends at"
            f" {gap('fitted12-both')}. What servers send is a sum of orthogonalised steps, whose"
            " singular values are all of one size. Every entry in 2 bits (`s2w.values=normal2`),"
            f" with rank 12 % to the servers, ends at {gap('fitted12-dense')}, where a model that"
            f" is sent back whole ends at {gap('fitted12')}."
        ),
        ("rank5", "rank5-ef14", "rank5-none"): lambda: (
            f"**Error feedback**: rank 5 % ends at {gap('rank5')} with EF21, at"
            f" {gap('rank5-ef14')} with the classic form and at {gap('rank5-none')} without."
        ),
        (muon, power, dion, *demos): lambda: (
            "**Other methods**: Muon behind DDP, with the uncompressed run's steps, ends"
            f" at {gap(muon)}; with PowerSGD of rank 16 ({bits(power)}) at {gap(power)}; Dion of"
            f" rank 15 % in 4-bit values ({bits(dion)}) at {gap(dion)}; DeMo with"
            f" {bits(demos[0])} at {gap(demos[0])} and with {bits(demos[1])} at {gap(demos[1])}."
        ),
        (*served, "fitted4", "fitted12", "demo32"): lambda: (
            "**Below half a bit** another kind of feedback is better. Of a momentum that forgets"
            " noise, EF21's G_j forgets nothing without a message. Where gradients themselves are"
            " compressed, what was not sent is kept and fades by 0.92 a step, and the momentum is"
            " the server's (`feedback=ef14`, beta 1), with a larger rank for the tied embedding,"
            f" rank 3, 6 and 12 % ({listed(bits(name) for name in served)}) end at"
            f" {gap(*served)} and save {fewer(*served)}. With EF21 rank 4 and 12 %"
            f" ({listed(bits(name) for name in ('fitted4', 'fitted12'))}) end at"
            f" {gap('fitted4', 'fitted12')}. DeMo, which also keeps what it did not send, ends"
            f" with {bits('demo32')} at {gap('demo32')}. The paper's theorems do not cover this."
        ),
    }
    done = [text() for names, text in found.items() if results.keys() >= set(names)]
    done += why(results, replayed)
    return "\n\n".join(textwrap.fill(text, 100, break_on_hyphens=False) for text in done)


def why(results: dict[str, Result], replayed: dict[str, dict]) -> list[str]:
    """What the replay explains, where it has enough settings to say so."""
    shown = sorted(replayed.keys() & results.keys())
    if len(shown) < 10:
        return []
    losses = places([mean(results[name].final) for name in shown])
    by_error, by_alignment = (
        correlation(places([replayed[name][key] for name in shown]), losses)
        for key in ("error", "alignment")
    )
    return [
        "**Why**: of one worker's gradients in the uncompressed run, sent by"
        f" {len(shown)} compressors of the study (`scripts/study_replay.py`), the error of G"
        f" has a rank correlation of {by_error:.2f} with the loss at the end, and the alignment"
        f" of the LMO's step of G with that of M one of {by_alignment:.2f}. An LMO gives small"
        " directions the length of large ones, so it helps to send many of them, if roughly:"
        " hence few bits for the long factor, and no gain from exact singular vectors."
    ]


def places(values: Sequence[float]) -> list[int]:
    """The place of each among all, by size."""
    order = sorted(values)
    return [order.index(value) for value in values]


def listed(parts: Iterable[str]) -> str:
    """Parts as a sentence has them: a, b and c."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
