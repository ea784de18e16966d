"""Kinds of steps of the study: momenta, Muon with feedback, signs before the LMO and after it."""

from collections.abc import Callable
from statistics import mean

from scripts.probes.sign_replay import BETAS, MEASURED
from scripts.shakespeare.results import Result, Results, of_families
from scripts.shakespeare.tables import END, LOSS, SEEDS, SETTING, of, table

BETA, SLOW = BETAS
MUON = "muon_feedback/without"
# Signs, and of arXiv:2607.29674 names and losses at 124 M parameters, one run each (the file
# results/nanogpt/SUMMARY.md of intsystems/SignMuon).
THEIRS = {
    MUON: ("none: Muon", "", "Muon", 3.2785),
    "signs/before-ef21": ("before the LMO", "EF21", "EF21-MuonUSign", 3.3203),
    "signs/before-none": ("before the LMO", "none", "MuonUSign", 3.2959),
    "signs/after-ef21": ("after the LMO", "EF21", "EF21-SignMuon", 3.2860),
    "signs/after-none": ("after the LMO", "none", "SignMuon", 3.2881),
    "signs/after-none-radius1": ("after the LMO, half the radius", "none", "", None),
}


def percent(ratio: float, form: str = "+.1f") -> str:
    """Over 1."""
    return f"{100 * (ratio - 1):{form}} %"


def over_muon(one: Result) -> str:
    """The loss over those of Muon's seeds that it has too."""
    muon = one.baseline.ends[: len(one.ends)]
    return "" if one.is_baseline else percent(one.loss / mean(muon))


def steps(results: Results, replayed: dict[tuple[str, float], dict]) -> dict:
    """What the page says of them, with what was replayed by rule and beta."""

    def ef21_over_none(loss: Callable[[str], float], place: str) -> str:
        return percent(loss(f"signs/{place}-ef21") / loss(f"signs/{place}-none"))

    def seeds_above(name: str) -> str:
        one = results[name]
        above = sum(mine > muon for mine, muon in zip(one.ends, one.baseline.ends, strict=True))
        return f"{above} of {len(one.ends)}"

    def at_gradients(name: str) -> str:
        of_all_steps = results[name.rpartition("-")[2]]
        return percent(results[name].loss / of_all_steps.loss, "+.0f")

    return {
        "momenta": momenta_table(results),
        "at_steps": lambda name: f"{results[name].gap:+.0f} %",
        "at_gradients": at_gradients,
        "muon_feedback": feedback_table(results),
        "over_muon": lambda name: over_muon(results[name]),
        "seeds_above": seeds_above,
        "signs": signs_table(results, replayed),
        "ef21": lambda place: ef21_over_none(lambda name: results[name].loss, place),
        "their_ef21": lambda place: ef21_over_none(lambda name: THEIRS[name][-1], place),
        "slow": f"{1 - SLOW:g}",
        **{
            f"{prefix}{key}": lambda rule, key=key, beta=beta: f"{replayed[rule, beta][key]:.2f}"
            for key in MEASURED
            for prefix, beta in (("", BETA), ("slow_", SLOW))
        },
    }


def momenta_table(results: Results) -> str:
    """The final loss of every kind and message, by steps and by gradients of a batch."""

    def kind(name: str) -> str:
        return name.removeprefix("momentum/").partition("-")[0].replace("mvr0", "mvr, gamma 0")

    rows = [
        (results[message], "polyak" if name == message else kind(name), one)
        for message in ("identity", "fitted9")
        for name, one in results.items()
        if name == message or (name.startswith("momentum/") and name.endswith(f"-{message}"))
    ]
    columns = [
        of(0, SETTING, "message"),
        of(1, ("momentum", str)),
        of(2, ("steps", lambda one: str(one.last["step"]))),
        ("gradients", lambda row: str((1 if row[1] == "polyak" else 2) * row[2].last["step"])),
        of(2, LOSS),
    ]
    return table(columns, rows, text_columns=2)


def feedback_table(results: Results) -> str:
    """Of Muon with feedback of its steps the final loss of every radius."""
    columns = [
        ("hidden layers", lambda one: "Muon" if one.is_baseline else "with feedback"),
        ("radius", lambda one: one.setting.name.partition("-radius")[2] or "2"),
        *(SEEDS, ("final loss", END[1]), ("over Muon", over_muon)),
    ]
    return table(columns, of_families(results, "muon feedback"))


def signs_table(results: Results, replayed: dict[tuple[str, float], dict]) -> str:
    """Losses here, those of the work whose claim it is, and what was replayed."""

    def their_gap(name: str) -> str:
        loss, muon = THEIRS[name][-1], THEIRS[MUON][-1]
        return "" if name == MUON or loss is None else percent(loss / muon)

    def measured(name: str, key: str) -> str:
        rule = "muon" if name == MUON else name.removeprefix("signs/")
        return f"{replayed[rule, BETA][key]:.2f}" if (rule, BETA) in replayed else ""

    columns = [
        ("signs", lambda name: THEIRS[name][0]),
        ("feedback", lambda name: THEIRS[name][1]),
        ("final loss", lambda name: results[name].loss_text),
        ("over Muon", lambda name: over_muon(results[name])),
        ("at 124 M: name", lambda name: THEIRS[name][2]),
        ("final loss", lambda name: f"{loss:.4f}" if (loss := THEIRS[name][3]) else ""),
        ("over Muon", their_gap),
        *((key, lambda name, key=key: measured(name, key)) for key in MEASURED),
    ]
    return table(columns, THEIRS, text_columns=2)
