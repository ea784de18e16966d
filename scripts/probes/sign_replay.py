"""Why feedback of signs helps or hurts: one worker's gradients, sent by every rule of signs.

Muon of the study is trained by one worker, and its gradients of a few layers are kept. What the
rules of the study's signs send and step is then made of them: signs of M_j, or of D = LMO(M_j),
with EF21 and without. Measured are, as means over layers and rounds,

    error      ||what servers know - T|| / ||T||, where T is what they are to know, M or D
    turn       ||T - T of the round before|| / ||T||
    alignment  the cosine of the step and of Muon's, D: 1 where they are the same
    descent    the cosine of the step and of minus the newest gradient, which Muon has a part of

Gradients are the same for all: what a rule does to the path of the model is left out. A slower
momentum (BETAS) is replayed too, though nothing was trained with it.
"""

from collections.abc import Iterator, Sequence
from statistics import mean

import torch
from torch import Tensor

from ef21_muon import EF21Muon
from ef21_muon.compressors import Identity, Quantize
from ef21_muon.norms import Spectral
from scripts.probes.trainings import ROUNDS, config_of, cosine, is_measured, worker_gradients

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


def records() -> Iterator[dict]:
    """By rule and beta."""
    gradients = worker_gradients(config_of("muon_feedback/without"), ROUNDS, count=1)
    for rule in RULES:
        for beta in BETAS:
            measured = [replay(of_layer, rule, beta) for of_layer in gradients.values()]
            means = {key: mean(one[key] for one in measured) for key in MEASURED}
            yield {"rule": rule, "beta": beta, **means}


def replay(gradients: Sequence[Tensor], rule: str, beta: float) -> dict[str, float]:
    """Of one layer's gradients, each (m, n), what is measured."""
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
        if is_measured(done, len(gradients)):
            known = state["server_gradient"]
            found["error"].append(float((known - wanted).norm() / wanted.norm()))
            found["turn"].append(float((wanted - before).norm() / wanted.norm()))
            found["alignment"].append(cosine(layer.detach(), muon))
            found["descent"].append(cosine(layer.detach(), -gradient))
        before = wanted
    return {key: mean(values) for key, values in found.items()}
