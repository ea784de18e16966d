"""README.md of scripts/gpu/run.py, from its records alone."""

from collections.abc import Iterable

from ef21_muon.checks import renamed
from scripts.studies import markdown
from training.renamed import modern_label

PHASES = ("forward_backward", "encode", "exchange", "decode", "server")
NOT_A_GPU = (
    "\n**These records were made without a GPU, on a tiny model: they prove nothing about GPUs, "
    "only that the script runs.**\n"
)


def report(records: list[dict], names: Iterable[str]) -> str:
    """README.md. names: of the runs, in the order of the table."""
    kinds = {kind: [] for kind in ("facts", "part", "tests", "verify", "step", "training")}
    for record in map(modern, records):
        kinds[record["record"]].append(record)
    (facts,), steps = kinds["facts"], kinds["step"]
    what = f"{facts['device']}, torch {facts['torch']}, {facts['cores']} cores"
    parts = "; ".join(f"{part['part']} {_end(part)}" for part in kinds["part"])
    tests = [line for one in kinds["tests"] for line in (one["summary"], *one["failed"])]
    return f"""# What a GPU has shown

`make gpu` on one machine: {what}.
{"" if "cuda" in facts else NOT_A_GPU}
Parts and their seconds: {parts}.

## Tests and claims

Tests marked `cuda`: {chr(10).join(tests) or "not run."}

{chr(10).join(map(claims, kinds["verify"])) or "Claims: not run."}

## A step

One worker alone, gradients of {steps[0]["tokens"] if steps else 0}
tokens; medians, in ms, by events on the device. *ms* is the whole step on the host's clock, from
idle to idle. State is what stays allocated of the optimizer, peak what a step allocates beyond.
*Host waits* is what torch says of a step that waits for the device; none may.

{step_table(steps)}

## Two workers on one GPU

Messages go through pinned host memory (`transport=host`), 300 steps of 124M on Shakespeare in
GPT-2's tokens, and nothing is compiled. Milliseconds are of a step in the second half, evaluations
left out; phases are rank 0's, by events on the device, so that its waiting for a message is in the
whole step alone.

{training_table(kinds["training"], kinds["part"], names)}

{commits(kinds["training"])}
"""


def modern(record: dict) -> dict:
    """A record of any version, with the names of today's runs and compressors."""
    new = {key: modern_label(record[key]) for key in ("run", "part") if key in record}
    if "method" in record:
        new["method"] = renamed.SPECS.get(record["method"], record["method"])
    return record | new


def _end(part: dict) -> str:
    failed = f" (exit {part['status']}: {part.get('error') or 'no line says why'})"
    why = {0: "", None: " (time was up)"}.get(part["status"], failed)
    return f"{part['seconds']:.0f}{why}"


def claims(record: dict) -> str:
    failed = "".join(f" `{line}`" for line in record["failed"])
    return f"`scripts/verify.py` with two workers that share the GPU: {record['summary']}.{failed}"


def step_table(steps: list[dict]) -> str:
    rows = [["method", "ms", "encode", "decode", "server", "state MB", "peak MB", "host waits"]]
    for one in steps:
        phases = one["phases_ms"]
        shown = [f"{phases[p]:.2f}" if p in phases else "" for p in ("encode", "decode", "server")]
        state = f"{one['state_bytes'] / 1e6:.0f}" if "state_bytes" in one else ""
        peak, waits = f"{one['peak_bytes'] / 1e6:.0f}", one["waits"] or "none"
        rows.append([one["method"], f"{one['ms']:.2f}", *shown, state, peak, waits])
    return markdown(rows)


def training_table(records: list[dict], parts: list[dict], names: Iterable[str]) -> str:
    heading = ["run", "test loss", "bytes sent", "ms per step"]
    rows = [[*heading, *(phase.replace("_", ", ") for phase in PHASES)]]
    for name in names:
        of_run = [one for one in records if one["run"] == name]
        trained = [one for one in of_run if one["of"] == "train"]
        ends = [one for one in of_run if one["of"] == "end"]
        if not ends or "test_loss" not in ends[-1]:
            part = [one for one in parts if one["part"] == name]
            rows.append([name, _why_not(trained, ends, part), *[""] * (len(rows[0]) - 2)])
            continue
        first, last = trained[(len(trained) - 1) // 2], trained[-1]
        spent = [last["seconds"] - first["seconds"]]
        spent += [last["phases"][phase] - first["phases"][phase] for phase in PHASES]
        between = max(1, last["step"] - first["step"])
        loss, sent = f"{ends[-1]['test_loss']:.4f}", f"{ends[-1]['w2s_bytes']:,}"
        rows.append([name, loss, sent, *(f"{1000 * one / between:.1f}" for one in spent)])
    return markdown(rows)


def _why_not(trained: list[dict], ends: list[dict], part: list[dict]) -> str:
    """Why a run has no test loss at its end."""
    for one in (*ends, *part):
        if one.get("error"):
            return f"failed: {one['error'].removeprefix('error: ').partition(':')[0]}"
    return "did not end" if trained or part else "not run"


def commits(records: list[dict]) -> str:
    """Which versions the runs are of."""
    versions = {one["run"]: one["commit"] for one in records if "commit" in one}
    runs = "; ".join(f"{run}: {commit}" for run, commit in versions.items())
    joined = "Joined of several calls of `make gpu`, on machines alike. "
    return f"{joined if len({*versions.values()}) > 1 else ''}{runs}"
