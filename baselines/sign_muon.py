"""SignMuon and EF21-SignMuon: workers take the LMO and send signs of what it gives."""

import torch.distributed as dist
from torch import Tensor

from ef21_muon.arithmetic import Results
from ef21_muon.exchange.layers import LayerBatch
from ef21_muon.lmo.norms import AdaptiveRadius, Norm
from ef21_muon.messages.compressors import Compressor, Dense
from ef21_muon.messages.feedback import EF21
from ef21_muon.optimizer import EF21Muon
from ef21_muon.served import ServedOptimizer


class SignMuon(EF21Muon):
    """Signs after the LMO (arXiv:2607.29674), where EF21Muon has them before it.

    Of its momentum M_j every worker sends R_j, the compressed D_j = LMO(M_j), and the step is the
    mean of what servers know of the D_j:

        feedback="none"  R_j = C(D_j)        X = X + lr radius mean of R_j      SignMuon
        feedback="ef21"  R_j = C(D_j - G_j)  G = G + mean of R_j, X = X + lr radius G  EF21-SignMuon

    C(x) is mean |x| sign(x), a scale a layer, unless w2s says otherwise. That work's language
    models have one momentum, as one worker has here, and SignMuon's step there is
    sign(D) / sqrt(d_in), 1.25 times as long as this one for a square D; its several workers take a
    vote, not the mean.

    params, lr, beta, norm, radius, w2s, s2w, nesterov, weight_decay, server, buckets, missing, seed
    and process_group are those of EF21Muon, and so is what is raised; ValueError also for an
    AdaptiveRadius, since servers know no dual norm, and for lmo_feedback.
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        *,
        beta: float = 0.1,
        norm: Norm | None = None,
        radius: float = 1.0,
        w2s: Compressor | None = None,
        s2w: Compressor | None = None,
        feedback: str = "none",
        nesterov: bool = False,
        weight_decay: float = 0.0,
        server: str = "auto",
        buckets: int = 4,
        missing: str = "refuse",
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__(
            params,
            lr,
            beta=beta,
            norm=norm,
            radius=radius,
            w2s=w2s or Dense("sign@message"),
            s2w=s2w,
            feedback=feedback,
            nesterov=nesterov,
            weight_decay=weight_decay,
            server=server,
            buckets=buckets,
            missing=missing,
            seed=seed,
            process_group=process_group,
        )
        for group in self.param_groups:
            if isinstance(group["radius"], AdaptiveRadius) or group["lmo_feedback"]:
                raise ValueError(
                    f"radius={group['radius']} with lmo_feedback={group['lmo_feedback']} is not "
                    "allowed for SignMuon, whose servers take no LMO: give a number, and False"
                )

    @property
    def title(self) -> str:
        """The method's name in figures."""
        return {EF21: "EF21-SignMuon"}.get(self.feedback, "SignMuon")

    def _told(self, momentum: Tensor, group: dict) -> Tensor:
        """LMO(M_j)."""
        return group["norm"].lmo(momentum)

    def _recomputed(self, groups: list[dict], server: str) -> Results:
        return ServedOptimizer._recomputed(self, groups, server)  # servers take no LMO

    def _direction(self, batch: LayerBatch, group: dict) -> Tensor:
        return batch.server_gradient.clone()
