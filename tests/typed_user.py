"""A user's script, which `make lint` checks by mypy: what it may write, and what is refused."""

import torch

import ef21_muon
from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps, WorkerMesh, param_groups
from ef21_muon.compressors import TopK
from ef21_muon.norms import Spectral
from ef21_muon.values import Natural


def what_users_write(model: torch.nn.Module, adamw: torch.optim.AdamW) -> dict[str, float]:
    """Train with every optimizer."""
    groups = param_groups(model, roles={"head.*": "embedding"})
    optimizer = EF21Muon(groups, lr=0.02, w2s="rank:0.15:natural", s2w=TopK(0.1, Natural()))
    inner = EF21Muon(model.named_parameters(), norm=Spectral(), process_group=ALONE)
    local = LocalSteps([adamw, inner], sync_every={0: 30, 600: 10}, w2s={"hidden": "topk:0.05"})
    mesh = WorkerMesh(model.parameters(), ranks_per_worker=2)
    averaged = AveragedGradients(torch.optim.AdamW(mesh.share(model.parameters())), mesh=mesh)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    for one in (EF21Muon(model), optimizer, local, averaged):
        model(torch.ones(1, 4)).sum().backward()
        one.step()
        one.zero_grad()
        scheduler.step()
    with local.global_params():
        torch.save(model.state_dict(), "model.pt")
    local.final_sync()
    sent: int = optimizer.w2s_bytes + local.w2s_bytes
    return {"bytes": sent, **optimizer.diagnostics()["head.weight"]}


def what_is_refused(model: torch.nn.Module, adamw: torch.optim.AdamW) -> None:
    """Each line is an error, or mypy would warn of an unused ignore."""
    EF21Muon(model, momentum="polyak")  # type: ignore[arg-type]
    EF21Muon(model, process_group="alon")  # type: ignore[arg-type]
    LocalSteps(adamw, every=30)  # type: ignore[call-arg]
    LocalSteps(adamw).agreed()  # type: ignore[attr-defined]
    TopK("0.1")  # type: ignore[arg-type]
    ef21_muon.TopK(0.1)  # type: ignore[attr-defined]
