"""Optimizers of all-reduced gradients: DistributedDataParallel with torch's communication hooks.

What is counted is what the hooks hand to the collective: `w2s_bytes` and `s2w_bytes` are its size,
once each way, and `wire_tx_bytes` what a ring all-reduce of it sends, 2 (n - 1) / n of the size.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket, ProcessGroup
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from baselines.collectives import Collectives
from baselines.greedylore import GreedyLore
from baselines.numbers import check_number
from ef21_muon.guards import PhaseTimer
from ef21_muon.layers import named_layers
from ef21_muon.optimizer import EF21Muon
from ef21_muon.settings import choice, whole_number
from ef21_muon.transport.agreement import PARTED, require_equal_parameters
from ef21_muon.transport.fixed import ALONE
from ef21_muon.transport.schedule import Rounds

HOOKS = ("float32", "float16", "bfloat16", "powersgd", "greedylore")
LOW_RANK = ("powersgd", "greedylore")
_of_ddp = signature(DistributedDataParallel.__init__).parameters
SYNC_BUFFERS = (  # which older versions of torch name otherwise
    "forward_sync_buffers" if "forward_sync_buffers" in _of_ddp else "broadcast_buffers"
)


class AllReduced:
    """Mixed into an optimizer: it works on gradients that DistributedDataParallel has averaged.

    hook: "float32" is the plain all-reduce, "float16" and "bfloat16" (NCCL alone) halve it, and
    "powersgd" (Vogels et al., arXiv:1905.13727) sends factors of rank `rank`, in float32, from the
    third step on. "greedylore" (baselines.greedylore) sends gradients whole every `every` steps,
    the first included, and at rank `rank` in the steps between. Raises ValueError for a hook that
    there is not, and without a process group.
    """

    name: str
    # What train.py asks every optimizer for.
    rounds = Rounds(1)
    server = mesh = correction = None
    inner = ()
    watch = False

    def _reduce_with(
        self, hook: str, rank: int, every: int, process_group: ProcessGroup | None
    ) -> None:
        """To be called at the end of a constructor: a hook's state is part of the optimizer's."""
        self.hook, self.rank = choice("hook", hook, HOOKS), whole_number("rank", rank, least=1)
        self.every = whole_number("every", every, least=1)
        if not dist.is_initialized():
            raise ValueError("an all-reduce needs a process group: launch with torchrun")
        if hook == "bfloat16" and dist.get_backend(process_group) == "gloo":
            raise ValueError("hook='bfloat16' is not allowed on gloo: use float16, or NCCL")
        self.reduced_over = process_group
        self.reduced_bytes = 0
        self.timer = PhaseTimer(self.param_groups[0]["params"][0].device)
        if hook == "greedylore":
            self.collectives = Collectives(process_group)
            self.lore = GreedyLore(self, rank, every, self.collectives.mean)

    @property
    def round(self) -> int:
        """Steps so far."""
        return self._steps_taken

    @property
    def whole_every(self) -> int:
        """The steps between those whose gradients are sent whole; 0 where all are, or none."""
        return self.every if self.hook == "greedylore" else 0

    def finish(self) -> None:
        """Nothing is left to send."""

    def agreed(self) -> AbstractContextManager[None]:
        """Within it the parameters are what workers agree on, as always."""
        return nullcontext()

    @property
    def title(self) -> str:
        """The method's name in figures."""
        how = {
            "float32": "all-reduce",
            "powersgd": f"PowerSGD rank {self.rank}",
            "greedylore": f"GreedyLore rank {self.rank}, whole every {self.every}",
        }
        return f"{self.name}, {how.get(self.hook, f'all-reduce {self.hook}')}"

    def wrap(self, model: nn.Module) -> DistributedDataParallel:
        """The module to call in place of `model`, whose backward pass averages the gradients."""
        # The PowerSGD hook starts collectives from callbacks; on gloo with several buckets ranks
        # start them in different orders and wait for one another for ever. So it gets one bucket;
        # GreedyLore, which waits for its own, sends one buffer of all layers so.
        wrapped = DistributedDataParallel(
            model,
            process_group=self.reduced_over,
            **{SYNC_BUFFERS: False},
            bucket_cap_mb=1024 if self.hook in LOW_RANK else None,
        )
        hooks = {"powersgd": self._powersgd, "greedylore": self._greedylore}
        wrapped.register_comm_hook(None, hooks.get(self.hook, self._plain)())
        return wrapped

    def check_finite(self) -> None:
        """Raise FloatingPointError if a parameter is NaN or infinite. Waits for the device."""
        for group in self.param_groups:
            finite = torch.stack([p.isfinite().all() for p in group["params"]])
            if not finite.all():
                raise FloatingPointError(
                    f"a parameter of group {group['name']} is not finite: lower the learning rate"
                )

    def check_agreement(self) -> None:
        """Raise ValueError if workers hold different parameters; to be called on all ranks.

        Names rank and layer. Waits for the device.
        """
        named = [(name, parameter) for _, name, parameter, _ in named_layers(self.param_groups)]
        require_equal_parameters(named, self.reduced_over, PARTED.format(""))

    @property
    def w2s_bytes(self) -> int:
        """Bytes that this worker has handed to all-reduces so far."""
        return self.reduced_bytes

    @property
    def s2w_bytes(self) -> int:
        """Bytes of the results of all-reduces so far."""
        return self.reduced_bytes

    received_bytes = s2w_bytes

    @property
    def wire_tx_bytes(self) -> int:
        """Bytes that this rank has handed to the network so far, by a ring."""
        ranks = dist.get_world_size(self.reduced_over)
        return 2 * self.reduced_bytes * (ranks - 1) // ranks

    def _plain(self) -> Callable:
        names = {"float16": "fp16_compress_hook", "bfloat16": "bf16_compress_hook"}
        hook = getattr(default_hooks, names.get(self.hook, "allreduce_hook"))
        size = 4 if self.hook == "float32" else 2

        def counted(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
            self.reduced_bytes += size * bucket.buffer().numel()
            return hook(self.reduced_over, bucket)

        return counted

    def _powersgd(self) -> Callable:
        powersgd = powerSGD_hook.PowerSGDState(
            self.reduced_over, matrix_approximation_rank=self.rank, start_powerSGD_iter=2
        )

        def counted(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
            whole = powersgd.iter < powersgd.start_powerSGD_iter
            before = powersgd.total_numel_after_compression
            result = powerSGD_hook.powerSGD_hook(powersgd, bucket)
            sent = powersgd.total_numel_after_compression - before
            self.reduced_bytes += 4 * (bucket.buffer().numel() if whole else sent)
            return result

        return counted

    def _greedylore(self) -> Callable:
        def counted(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
            before = self.collectives.traffic.w2s_bytes
            self.lore.average(bucket.parameters(), bucket.gradients(), self._steps_taken)
            self.reduced_bytes += self.collectives.traffic.w2s_bytes - before
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        return counted

    @property
    def _steps_taken(self) -> int:
        """Also before a checkpoint from which this goes on."""
        raise NotImplementedError


class AdamW(AllReduced, torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov and Hutter, arXiv:1711.05101) behind DDP."""

    name = "AdamW"
    generators: ClassVar[dict] = {}

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        hook: str = "float32",
        rank: int = 4,
        every: int = 200,
        process_group: ProcessGroup | None = None,
    ):
        if not (isinstance(betas, Sequence) and len(betas) == 2):
            raise ValueError(f"betas={betas} is not allowed: give two numbers")
        check_number("lr", lr)
        check_number("weight_decay", weight_decay)
        for beta in betas:
            check_number("betas", beta)
        super().__init__(params, lr=lr, betas=tuple(betas), weight_decay=weight_decay)
        for group in self.param_groups:
            for p in group["params"]:  # now, and not in the first step: a checkpoint needs places
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": torch.tensor(0.0, dtype=torch.float32), **moments}
        self._reduce_with(hook, rank, every, process_group)

    @property
    def _steps_taken(self) -> int:
        return int(self.state[self.param_groups[0]["params"][0]]["step"])

    def step(self, closure=None):
        with self.timer("server"):
            return super().step(closure)


class Muon(AllReduced, EF21Muon):
    """The LMO step of this library on every rank, behind DDP.

    It is EF21Muon alone in its process group: with the same norms and without compression the same
    method, so that only communication differs.
    """

    name = "Muon"

    def __init__(
        self,
        params,
        lr: float = 0.02,
        *,
        beta: float = 0.1,
        hook: str = "float32",
        rank: int = 4,
        every: int = 200,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(params, lr, beta=beta, process_group=ALONE)
        self._reduce_with(hook, rank, every, process_group)

    def check_finite(self) -> None:
        """Raise FloatingPointError for a gradient or a parameter that is not finite."""
        EF21Muon.check_finite(self)
        super().check_finite()

    @property
    def _steps_taken(self) -> int:
        return self.steps
