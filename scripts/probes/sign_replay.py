"""Why feedback of signs helps or hurts: `python scripts/shakespeare/sign_replay.py`.

Muon of the study is trained by one worker, and its gradients of a few layers are kept. What the
rules of SIGN_SETTINGS send and step is then made of them: signs of M_j, or of
D = LMO(M_j), with EF21 and without. Of every rule, means over layers and rounds go to
results/shakespeare/sign_replay.jsonl:

    error      ||what servers know - T|| / ||T||, where T is what they are to know, M or D
    turn       ||T - T of the round before|| / ||T||
    alignment  the cosine of the step and of Muon's, D: 1 where they are the same
    descent    the cosine of the step and of minus the newest gradient, which Muon has a part of

Gradients are the same for all: what a rule does to the path of the model is left out. A slower
momentum (BETAS) is replayed too, though nothing was trained with it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ef21_muon import EF21Muon
from ef21_muon.compressors import Identity, Quantize
from ef21_muon.norms import Spectral
from scripts.shakespeare.changes import cosine
from scripts.shakespeare.replay import EVERY, ROUNDS, worker_gradients
from scripts.shakespeare.results import RESULTS, SIGN_REPLAY_LOG
from scripts.shakespeare.settings import FEEDBACK_SETTINGS
from training.config import compose

BETAS = (0.2, 0.05)  # the study's, and about that of the work whose claim it is
SIGNS = Quantize("sign@tensor")
RULES = {  # who takes the LMO, the feedback, and what is sent
    "muon": ("servers", "none", Identity()),
    "before-ef21": ("servers", "ef21", SIGNS),
    "before-none": ("servers", "none", SIGNS),
    "after-ef21": ("workers", "ef21", SIGNS),
    "after-none": ("workers", "none", SIGNS),
}
MEASURED = ("error", "turn", "alignment", "descent")
NORM = Spectral("svd", scaling="none")


def replay(gradients: Sequence[Tensor], rule: str, beta: float) -> dict[str, float]:
    """Of one layer's gradients, each (m, n), what is measured, in the second half."""
    lmo, feedback, w2s = RULES[rule]
    layer = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = EF21Muon(
        [layer], lr=1.0, momentum=1 - beta, norm=NORM, w2s=w2s, lmo=lmo, feedback=feedback
    )
    found: dict[str, list[float]] = {key: [] for key in MEASURED}
    before = torch.zeros_like(layer)
    for done, gradient in enumerate(gradients, 1):
        layer.data.zero_()
        layer.grad = gradient
        optimizer.step()
        state = optimizer.state[layer]
        muon = NORM.lmo(state["momentum"])
        wanted = muon if lmo == "workers" else state["momentum"].clone()
        if done > len(gradients) // 2 and done % EVERY == 0:
            known = state["server_gradient"]
            found["error"].append(float((known - wanted).norm() / wanted.norm()))
            found["turn"].append(float((wanted - before).norm() / wanted.norm()))
            found["alignment"].append(cosine(layer.detach(), muon))
            found["descent"].append(cosine(layer.detach(), -gradient))
        before = wanted
    return {key: mean(values) for key, values in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.parse_args(arguments)
    torch.set_num_threads(1)
    muon = next(one for one in FEEDBACK_SETTINGS if one.name == "muon_feedback/without")
    config = compose(("experiment=shakespeare", *muon.overrides)).config
    gradients = worker_gradients(config, ROUNDS, count=1)
    lines = []
    for rule in RULES:
        for beta in BETAS:
            measured = [replay(of_layer, rule, beta) for of_layer in gradients.values()]
            record = {key: mean(one[key] for one in measured) for key in measured[0]}
            print(f"{rule:<12} beta {beta:<5} {record}", flush=True)
            lines.append(json.dumps({"rule": rule, "beta": beta, **record}) + "\n")
    (RESULTS / SIGN_REPLAY_LOG).write_text("".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
