"""Signs before the LMO and after it, with EF21 and without: the page's section."""

from statistics import mean

from scripts.measuring import markdown
from scripts.shakespeare.findings import filled
from scripts.shakespeare.muon_feedback import over
from scripts.shakespeare.results import Result
from scripts.shakespeare.sign_replay import MEASURED

# Of arXiv:2607.29674, its names and losses at 124 M parameters, one run each (the file
# results/nanogpt/SUMMARY.md of intsystems/SignMuon).
THEIRS = {
    "before-ef21": ("EF21-MuonUSign", 3.3203),
    "before-none": ("MuonUSign", 3.2959),
    "after-ef21": ("EF21-SignMuon", 3.2860),
    "after-none": ("SignMuon", 3.2881),
}
THEIR_MUON = 3.2785
TITLES = {
    "before-ef21": ("before the LMO", "EF21"),
    "before-none": ("before the LMO", "none"),
    "after-ef21": ("after the LMO", "EF21"),
    "after-none": ("after the LMO", "none"),
    "after-none-radius1": ("after the LMO, half the radius", "none"),
}
BETA = 0.2  # of the runs


def signs_section(found: dict[str, Result], muon: Result | None, replayed: list[dict]) -> str:
    """Nothing where no run has been made, or Muon's not."""
    if not (found and muon):
        return ""
    return f"""## Signs before and after the LMO

An independent implementation (arXiv:2607.29674) reports that with one sign per entry the final
loss is higher with EF21 than without feedback: 3.3203 for 3.2959 at 124 M parameters. These are of
signs *before* the LMO, where EF21-Muon has them; there are two rules after it too. Here are all
four, by one worker as there, half the steps, with Muon's radii and momentum; a scale per layer, and
the embedding is sent whole. SignMuon's steps are 0.8 times as long as Muon's, and 0.4 times in a
run of their own; in that work 0.5 times.

{signs_table(found, muon, replayed)}

{filled(signs_text(found))}

{why_text(found, replayed)}

"""


def signs_table(found: dict[str, Result], muon: Result, replayed: list[dict]) -> str:
    """Losses here and there, and what the replay says of the rules that have run."""
    of_rules = {one["rule"]: one for one in replayed if one["beta"] == BETA}
    rows = [
        [
            *(
                "signs",
                "feedback",
                "final loss",
                "over Muon",
                "at 124 M: name",
                "final loss",
                "over Muon",
            ),
            *MEASURED,
        ],
        ["none: Muon", "", muon.final_text, "", "Muon", f"{THEIR_MUON:.4f}", ""],
    ]
    rows[1] += measured(of_rules.get("muon"))
    for rule, titles in TITLES.items():
        if (result := found.get(f"signs/{rule}")) is None:
            continue
        cells = [*titles, result.final_text, f"{over(result, muon):+.1f} %"]
        if rule in THEIRS:
            name, loss = THEIRS[rule]
            cells += [name, f"{loss:.4f}", f"{100 * (loss / THEIR_MUON - 1):+.1f} %"]
        else:
            cells += 3 * [""]
        rows.append(cells + measured(of_rules.get(rule)))
    return markdown(rows, text_columns=2)


def measured(record: dict | None) -> list[str]:
    """The cells of a rule in the replay."""
    return [f"{record[key]:.2f}" if record else "" for key in MEASURED]


def signs_text(found: dict[str, Result]) -> str:
    """Whether the order is theirs, where both rules of a place have run."""
    found_here = []
    for place in ("before", "after"):
        rules = [f"{place}-{feedback}" for feedback in ("ef21", "none")]
        if not all(f"signs/{rule}" in found for rule in rules):
            continue
        here = [mean(found[f"signs/{rule}"].final) for rule in rules]
        there = [THEIRS[rule][1] for rule in rules]
        same = (here[0] > here[1]) == (there[0] > there[1])
        gaps = [f"{100 * (ef21 / none - 1):+.1f} %" for ef21, none in (here, there)]
        order = "as there" if same else "unlike there"
        found_here.append(
            f"{place} the LMO the final loss with EF21 is {gaps[0]} from that without feedback, "
            f"{order} ({gaps[1]})"
        )
    return f"In this setting, {', and '.join(found_here)}." if found_here else ""


def in_order(found: dict[str, Result], of: dict[tuple[str, float], dict]) -> bool:
    """Whether the rules' losses fall as their steps go further down the newest gradient."""
    rules = [rule for rule in THEIRS if f"signs/{rule}" in found]
    by_loss = sorted(rules, key=lambda rule: mean(found[f"signs/{rule}"].final))
    return by_loss == sorted(rules, key=lambda rule: -of[rule, BETA]["descent"])


def why_text(found: dict[str, Result], replayed: list[dict]) -> str:
    """What the replay says, where it has been run."""
    of = {(one["rule"], one["beta"]): one for one in replayed}
    if not of:
        return ""

    def pair(place: str, key: str, beta: float = BETA) -> str:
        both = [f"{of[f'{place}-{feedback}', beta][key]:.2f}" for feedback in ("ef21", "none")]
        return f"{both[0]} with EF21 and {both[1]} without"

    slow = min(beta for _, beta in of)
    turns = [f"{of['before-none', beta]['turn']:.2f}" for beta in (BETA, slow)]
    sentences = [
        "**Why** (`scripts/shakespeare/sign_replay.py`: gradients of one training through all "
        f"rules; last columns). In a step M turns by {turns[0]} of its own length, so that what "
        "EF21 has learnt of it is old before it is of use: servers are off by "
        f"{pair('before', 'error')}.",
        "The LMO gives all directions one length, those of the error too, and the cosine of a "
        f"step with Muon's is {pair('before', 'alignment')}. After the LMO nothing is magnified, "
        f"and it is {pair('after', 'alignment')}.",
        "What is old costs more where W goes to and fro. The cosine with minus the newest "
        f"gradient is {of['muon', BETA]['descent']:.2f} for Muon, before the LMO "
        f"{pair('before', 'descent')}, and after it {pair('after', 'descent')}"
        f"{', in the order of the losses of these four' if in_order(found, of) else ''}.",
        f"With a momentum of {1 - slow:g} M turns by {turns[1]}, and the cosine with "
        f"Muon's step before the LMO is {pair('before', 'alignment', slow)}: feedback of signs "
        "asks for what changes slowly. Nothing was trained with that.",
    ]
    return filled(" ".join(sentences))
