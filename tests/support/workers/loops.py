"""Loops of other projects on two ranks, as `rank<r>.json`: nanoGPT's, accelerate's, transformers'.

Run by torchrun with a directory. The model is transformers' GPT-2, whose weights are stored as
(d_in, d_out), in a tiny configuration.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "TRANSFORMERS_VERBOSITY": "error",
}

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ef21_muon import AveragedGradients, EF21Muon, param_groups
from ef21_muon.compressors import RankK, TopK

VOCABULARY, CONTEXT, STEPS = 32, 16, 8
TEXT = torch.arange(4096) ** 2 % 23  # next tokens follow from the ones before


def new_model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, use_cache=False,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def new_optimizer(model, **options):
    return EF21Muon(param_groups(model, "scion"), lr=0.02, w2s=RankK(0.5, "natural"), **options)


def parameters_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()


def test_loss(model):
    with torch.no_grad():
        return model(input_ids=TEXT[:256].view(16, 16), labels=TEXT[:256].view(16, 16)).loss.item()


def batch(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    starts = torch.randint(len(TEXT) - CONTEXT, (4,), generator=generator)
    return torch.stack([TEXT[start : start + CONTEXT] for start in starts])


class Loop:
    """nanoGPT's loop: accumulation, clipping, a scaler, and learning rates by hand."""

    def __init__(self):
        self.model = new_model()
        self.optimizer = new_optimizer(self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        self.step = 0

    def run(self, steps):
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = 0.02 * (1 - self.step / 20)
            for micro_step in range(2):
                tokens = batch(2 * self.step + micro_step, dist.get_rank())
                loss = self.model(input_ids=tokens, labels=tokens).loss / 2
                self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1

    def load(self, saved):
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]


def nanogpt(path):
    """Rank 0 writes its checkpoint: what goes on from one of its own, and from one of all ranks."""
    loop = Loop()
    start = test_loss(loop.model)
    loop.run(4)
    for name, state in (
        ("mine", loop.optimizer.state_dict()),
        ("all", loop.optimizer.full_state_dict()),
    ):
        if dist.get_rank() == 0:
            saved = {"model": loop.model.state_dict(), "optimizer": state, "step": loop.step}
            torch.save(saved | {"scaler": loop.scaler.state_dict()}, path / f"{name}.pt")
    dist.barrier()
    loop.run(4)
    error_text = "no error"
    try:
        Loop().load(torch.load(path / "mine.pt"))
    except ValueError as error:
        error_text = str(error)
    resumed = Loop()
    resumed.load(torch.load(path / "all.pt"))
    resumed.run(4)
    losses = [start, test_loss(loop.model)]
    return [parameters_of(loop.model), parameters_of(resumed.model), losses, error_text]


def accelerate():
    """All but the model is prepared, so that nothing but the optimizer sends."""
    accelerator = Accelerator(cpu=True)
    model = new_model()
    loader = DataLoader([TEXT[i : i + CONTEXT] for i in range(0, 1024, CONTEXT)], batch_size=4)
    optimizer = new_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    optimizer, loader, scheduler = accelerator.prepare(optimizer, loader, scheduler)
    first = []
    for tokens in loader:
        first = first or tokens[:, 0].tolist()
        optimizer.zero_grad()
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    optimizer.optimizer.check_agreement()
    return [parameters_of(model), optimizer.optimizer.steps, len(loader), first]


class LocalGradients(Trainer):
    """transformers' Trainer without DistributedDataParallel: the optimizer is what sends."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = lambda model, **options: model


def trainer(kind, path):
    arguments = TrainingArguments(
        path, max_steps=STEPS, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    examples = [
        {"input_ids": TEXT[i : i + CONTEXT], "labels": TEXT[i : i + CONTEXT]}
        for i in range(0, 1024, CONTEXT)
    ]
    model = new_model()
    start = test_loss(model)
    optimizer = new_optimizer(model)
    training = kind(model, arguments, train_dataset=examples, optimizers=(optimizer, None))
    try:
        training.train()
    except RuntimeError as error:
        return str(error)
    optimizer.check_agreement()
    return [parameters_of(model), optimizer.steps, [start, test_loss(model)]]


def muon_and_adamw():
    """Muon for hidden matrices and AdamW for the rest, the commonest way to use it."""
    model = new_model()
    start = test_loss(model)
    hidden = [group for group in param_groups(model, "muon") if group["name"] == "hidden"]
    inside = {parameter for group in hidden for _, parameter in group["params"]}
    rest = [parameter for parameter in model.parameters() if parameter not in inside]
    optimizers = [
        EF21Muon(hidden, lr=0.02, w2s=RankK(0.5, "natural")),
        AveragedGradients(torch.optim.AdamW(rest, lr=0.003), w2s=TopK(0.3)),
    ]
    for step in range(STEPS):
        tokens = batch(step, dist.get_rank())
        model(input_ids=tokens, labels=tokens).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [parameters_of(model), [start, test_loss(model)]]


def main(directory):
    dist.init_process_group("gloo")
    report = {
        "nanogpt": nanogpt(directory),
        "accelerate": accelerate(),
        "trainer": trainer(Trainer, directory / "trainer"),
        "local trainer": trainer(LocalGradients, directory / "trainer"),
        "muon and adamw": muon_and_adamw(),
    }
    (directory / f"rank{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.barrier()
    with suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
