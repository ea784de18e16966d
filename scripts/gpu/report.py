"""README.md of scripts/gpu/run.py, from its records alone."""

from ef21_muon.checks import renamed
from scripts.gpu.run import RUNS
from scripts.measuring import markdown
from training.renamed import modern_label

PHASES = ("forward_backward", "encode", "exchange", "decode", "server")
NOT_A_GPU = (
    "\n**These records were made without a GPU, on a tiny model: they prove nothing about GPUs, "
    "only that the script runs.**\n"
)


def report(records: list[dict]) -> str:
    """README.md."""
    records = [modern(record) for record in records]
    (facts,) = of(records, "facts")
    on_gpu = "cuda" in facts
    what = f"{facts['device']}, torch {facts['torch']}, {facts['cores']} cores"
    parts = "; ".join(f"{part['part']} {_end(part)}" for part in of(records, "part"))
    return f"""# What a GPU has shown

`make gpu` on one machine: {what}.
{"" if on_gpu else NOT_A_GPU}
Parts and their seconds: {parts}.

## Tests and claims

Tests marked `cuda`: {tests(records)}

{claims(records)}

## A step

One worker alone, gradients of {of(records, "step")[0]["tokens"] if of(records, "step") else 0}
tokens; medians, in ms, by events on the device. *ms* is the whole step on the host's clock, from
idle to idle. State is what stays allocated of the optimizer, peak what a step allocates beyond.
*Host waits* is what torch says of a step that waits for the device; none may.

{step_table(records)}

## Two workers on one GPU

Messages go through pinned host memory (`transport=host`), 300 steps of 124M on Shakespeare in
GPT-2's tokens, and nothing is compiled. Milliseconds are of a step in the second half, evaluations
left out; phases are rank 0's, by events on the device, so that its waiting for a message is in the
whole step alone.

{training_table(records)}

{commits(records)}
"""


def modern(record: dict) -> dict:
    """A record of any version, with the names of today's runs and compressors."""
    new = {key: modern_label(record[key]) for key in ("run", "part") if key in record}
    if "method" in record:
        new["method"] = renamed.SPECS.get(record["method"], record["method"])
    return record | new


def of(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if record["record"] == kind]


def _end(part: dict) -> str:
    failed = f" (exit {part['status']}: {part.get('error') or 'no line says why'})"
    why = {0: "", None: " (time was up)"}.get(part["status"], failed)
    return f"{part['seconds']:.0f}{why}"


def tests(records: list[dict]) -> str:
    lines = [line for one in of(records, "tests") for line in (one["summary"], *one["failed"])]
    return "\n".join(lines) or "not run."


def claims(records: list[dict]) -> str:
    summaries = [
        f"`scripts/verify.py` with two workers that share the GPU: {one['summary']}."
        + "".join(f" `{line}`" for line in one["failed"])
        for one in of(records, "verify")
    ]
    return "\n".join(summaries) or "Claims: not run."


def step_table(records: list[dict]) -> str:
    rows = [["method", "ms", "encode", "decode", "server", "state MB", "peak MB", "host waits"]]
    for one in of(records, "step"):
        phases = one["phases_ms"]
        shown = [f"{phases[p]:.2f}" if p in phases else "" for p in ("encode", "decode", "server")]
        rows.append(
            [
                one["method"],
                f"{one['ms']:.2f}",
                *shown,
                f"{one['state_bytes'] / 1e6:.0f}" if "state_bytes" in one else "",
                f"{one['peak_bytes'] / 1e6:.0f}",
                one["waits"] or "none",
            ]
        )
    return markdown(rows, text_columns=1)


def commits(records: list[dict]) -> str:
    """Which versions the runs are of."""
    versions = {one["run"]: one["commit"] for one in of(records, "training") if "commit" in one}
    runs = "; ".join(f"{run}: {commit}" for run, commit in versions.items())
    joined = "Joined of several calls of `make gpu`, on machines alike. "
    return f"{joined if len({*versions.values()}) > 1 else ''}{runs}"


def _why_not(trained: list[dict], ends: list[dict], part: list[dict]) -> str:
    """Why a run has no test loss at its end."""
    for one in (*ends, *part):
        if one.get("error"):
            return f"failed: {one['error'].removeprefix('error: ').partition(':')[0]}"
    return "did not end" if trained or part else "not run"


def training_table(records: list[dict]) -> str:
    heading = ["run", "test loss", "bytes sent", "ms per step"]
    rows = [[*heading, *(phase.replace("_", ", ") for phase in PHASES)]]
    runs = {}
    for one in of(records, "training"):
        runs.setdefault(one["run"], []).append(one)
    for name in RUNS:
        lines = runs.get(name, [])
        trained = [one for one in lines if one["of"] == "train"]
        ends = [one for one in lines if one["of"] == "end"]
        if not ends or "test_loss" not in ends[-1]:
            part = [one for one in of(records, "part") if one["part"] == name]
            rows.append([name, _why_not(trained, ends, part), *[""] * (len(rows[0]) - 2)])
            continue
        first, last = trained[(len(trained) - 1) // 2], trained[-1]
        between = max(1, last["step"] - first["step"])
        spent = [last["seconds"] - first["seconds"]]
        spent += [last["phases"][phase] - first["phases"][phase] for phase in PHASES]
        rows.append(
            [
                name,
                f"{ends[-1]['test_loss']:.4f}",
                f"{ends[-1]['w2s_bytes']:,}",
                *(f"{1000 * seconds / between:.1f}" for seconds in spent),
            ]
        )
    return markdown(rows, text_columns=1)
