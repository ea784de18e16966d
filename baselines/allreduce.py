"""Optimizers of all-reduced gradients: DistributedDataParallel with torch's communication hooks.

What is counted is what the hooks hand to the collective: `w2s_bytes` and `s2w_bytes` are its size,
once each way, and `wire_tx_bytes` what a ring all-reduce of it sends, 2 (n - 1) / n of the size.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket, ProcessGroup
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from baselines.collectives import Collectives
from baselines.greedylore import GreedyLore
from baselines.numbers import check_number
from ef21_muon.checks.guards import PhaseTimer
from ef21_muon.checks.settings import choice, whole_number
from ef21_muon.communicating import Communicating
from ef21_muon.layers import named_layers
from ef21_muon.optimizer import EF21Muon
from ef21_muon.transport.agreement import DIVERGED, require_equal_parameters
from ef21_muon.transport.fixed import ALONE
from ef21_muon.transport.schedule import Rounds

HOOKS = ("float32", "float16", "bfloat16", "powersgd", "greedylore")
LOW_RANK = ("powersgd", "greedylore")
_of_ddp = signature(DistributedDataParallel.__init__).parameters
SYNC_BUFFERS = (  # which older versions of torch name otherwise
    "forward_sync_buffers" if "forward_sync_buffers" in _of_ddp else "broadcast_buffers"
)


class AllReduced(Optimizer):
    """Steps of another optimizer, on gradients that DistributedDataParallel has averaged.

    stepper: that optimizer, which sends nothing: one of torch's, or EF21Muon with
    process_group=ALONE; `param_groups` and `state` are its own. hook: "float32" is the plain
    all-reduce, "float16" and "bfloat16" (NCCL alone) halve it, and "powersgd" (Vogels et al.,
    arXiv:1905.13727) sends factors of rank `rank`, in float32, from the third step on. "greedylore"
    (baselines.greedylore) sends gradients whole every `refresh_every` steps, the first included,
    and at rank `rank` in the steps between. Raises ValueError for an unknown hook, and without a
    process group.
    """

    # What train.py asks every optimizer for, beside the properties and calls that follow.
    rounds = Rounds(1)
    mesh = correction = None
    inner = ()
    watch = False

    def __init__(
        self,
        stepper: Optimizer,
        *,
        hook: str = "float32",
        rank: int = 4,
        refresh_every: int = 200,
        process_group: ProcessGroup | None = None,
    ):
        self.hook, self.rank = choice("hook", hook, HOOKS), whole_number("rank", rank, least=1)
        self.refresh_every = whole_number("refresh_every", refresh_every, least=1)
        if not dist.is_initialized():
            raise ValueError("an all-reduce needs a process group: launch with torchrun")
        if hook == "bfloat16" and dist.get_backend(process_group) == "gloo":
            raise ValueError("hook='bfloat16' is not allowed on gloo: use float16, or NCCL")
        super().__init__(stepper.param_groups, stepper.defaults)
        self.stepper, self.steps = stepper, 0
        self.reduced_over, self.reduced_bytes = process_group, 0
        self.timer = PhaseTimer(self.param_groups[0]["params"][0].device)
        self.generators, self.server = {}, None
        if self._is_ours:
            self.generators, self.server = stepper.generators, stepper.server
            stepper.timer = PhaseTimer(None)  # its time is a phase of the timer here
        self._take_over()
        if hook == "greedylore":
            self.collectives = Collectives(process_group)
            self.lore = GreedyLore(self, rank, refresh_every, self.collectives.mean)

    @property
    def round(self) -> int:
        """Steps so far."""
        return self.steps

    def step(self, closure: Callable | None = None):
        """A step of the other optimizer; on all workers together."""
        with self.timer("server"):
            loss = self.stepper.step(closure)
        self.steps += 1
        return loss

    def final_sync(self) -> None:
        """Nothing is left to send."""

    def global_params(self) -> AbstractContextManager[None]:
        """Within it the parameters are what workers agree on, as always."""
        return nullcontext()

    def resume_after(self, steps: int) -> None:
        """Count on from as many steps, with a state that was loaded."""
        self.steps = steps
        if self._is_ours:
            self.stepper.resume_after(steps)

    def state_dict(self) -> dict:
        """The other optimizer's, and the steps so far."""
        return self.stepper.state_dict() | {"steps": self.steps}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a `state_dict`."""
        self.stepper.load_state_dict(state_dict)
        self._take_over()
        self.resume_after(state_dict["steps"])

    def check_finite(self) -> None:
        """Raise FloatingPointError if a parameter is NaN or infinite. Waits for the device.

        Or, with EF21Muon, if a gradient was.
        """
        if self._is_ours:
            self.stepper.check_finite()
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
        require_equal_parameters(named, self.reduced_over, DIVERGED.format(""))

    @property
    def whole_every(self) -> int:
        """The steps between those whose gradients are sent whole; 0 where all are, or none."""
        return self.refresh_every if self.hook == "greedylore" else 0

    @property
    def title(self) -> str:
        """The method's name in figures."""
        how = {
            "float32": "all-reduce",
            "powersgd": f"PowerSGD rank {self.rank}",
            "greedylore": f"GreedyLore rank {self.rank}, whole every {self.refresh_every}",
        }
        return f"{type(self).__name__}, {how.get(self.hook, f'all-reduce {self.hook}')}"

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
            self.lore.average(bucket.parameters(), bucket.gradients(), self.steps)
            self.reduced_bytes += self.collectives.traffic.w2s_bytes - before
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        return counted

    @property
    def _is_ours(self) -> bool:
        return isinstance(self.stepper, Communicating)

    def _take_over(self) -> None:
        """Groups and state, which torch's optimizers replace when they load others."""
        self.param_groups, self.state = self.stepper.param_groups, self.stepper.state


class AdamW(AllReduced):
    """torch.optim.AdamW (Loshchilov and Hutter, arXiv:1711.05101) behind DDP."""

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        hook: str = "float32",
        rank: int = 4,
        refresh_every: int = 200,
        process_group: ProcessGroup | None = None,
    ):
        if not (isinstance(betas, Sequence) and len(betas) == 2):
            raise ValueError(f"betas={betas} is not allowed: give two numbers")
        check_number("lr", lr)
        check_number("weight_decay", weight_decay)
        for beta in betas:
            check_number("betas", beta)
        adamw = torch.optim.AdamW(params, lr=lr, betas=tuple(betas), weight_decay=weight_decay)
        for group in adamw.param_groups:
            for p in group["params"]:  # now, and not in the first step: a checkpoint needs places
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                adamw.state[p] = {"step": torch.tensor(0.0, dtype=torch.float32), **moments}
        super().__init__(
            adamw, hook=hook, rank=rank, refresh_every=refresh_every, process_group=process_group
        )


class Muon(AllReduced):
    """The LMO step of this library on every rank, behind DDP.

    It is EF21Muon alone in its process group: with the same norms and without compression the same
    method, so that only communication differs.
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        *,
        momentum: float = 0.9,
        hook: str = "float32",
        rank: int = 4,
        refresh_every: int = 200,
        process_group: ProcessGroup | None = None,
    ):
        muon = EF21Muon(params, lr, momentum=momentum, process_group=ALONE)
        super().__init__(
            muon, hook=hook, rank=rank, refresh_every=refresh_every, process_group=process_group
        )
