"""Generate text from a run: `python sample.py RUN_DIR "prompt" [--tokens 200]`."""

import argparse
from pathlib import Path

import numpy as np
import tiktoken
import torch
from omegaconf import OmegaConf

from model import GPT
from training.checkpoint import Checkpoints, load
from training.config import build
from training.workers import RunError, Workers


def load_model(run: Path | str) -> GPT:
    """The model of a run's newest checkpoint, on the CPU. Raises RunError if there is none."""
    run = Path(run)
    if not (run / "config.yaml").exists():
        raise RunError(f"{run} is not a run: give a directory with config.yaml and checkpoints")
    checkpoint = Checkpoints(run / "checkpoints", Workers(alone=True), keep=1).newest()
    if checkpoint is None:
        raise RunError(f"{run} has no checkpoint: train with checkpoint.every above 0")
    model = GPT(build(OmegaConf.load(run / "config.yaml").model, "model"))
    load(checkpoint, {f"parameter.{name}": p.detach() for name, p in model.named_parameters()})
    return model.eval()


class Bytes:
    """Text as its UTF-8 bytes."""

    def encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return np.array(tokens, dtype=np.uint8).tobytes().decode(errors="replace")


@torch.no_grad()
def generate(
    model: GPT, tokens: list[int], count: int, temperature: float, generator: torch.Generator
) -> list[int]:
    """`count` tokens that follow `tokens`, drawn from softmax(logits / temperature)."""
    text = torch.tensor([tokens])
    for _ in range(count):
        logits = model(text[:, -model.config.context :])[:, -1]
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        text = torch.cat([text, drawn], 1)
    return text[0, len(tokens) :].tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=200, help="(default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    options = parser.parse_args()
    if options.tokens < 1 or options.temperature <= 0 or not options.prompt:
        parser.error("give a prompt, at least 1 token, and a temperature above 0")
    workers = Workers(alone=True)  # also inside a job of several
    return workers.finish(lambda: write(options))


def write(options: argparse.Namespace) -> int:
    model = load_model(options.run)
    bytewise = OmegaConf.load(options.run / "config.yaml").data.vocab_size == 256
    coder = Bytes() if bytewise else tiktoken.get_encoding("gpt2")
    generator = torch.Generator().manual_seed(options.seed)
    prompt = coder.encode_ordinary(options.prompt)
    tokens = generate(model, prompt, options.tokens, options.temperature, generator)
    print(options.prompt + coder.decode(tokens))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
