"""Generate text from a run: `python sample.py RUN_DIR "prompt" [--tokens 200]`."""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from data.gpt2 import VocabularyError, gpt2
from model import GPT
from training.checkpoint import Checkpoints, load
from training.config import build
from training.workers import RunError, Workers


def load_model(run: Path | str) -> GPT:
    """The model in a run's newest checkpoint, on the CPU. Raises RunError if there is none."""
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
    """Text as its UTF-8 bytes. Bytes on a command line that are not UTF-8 stay as they are."""

    def encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode(errors="surrogateescape"))

    def decode(self, tokens: list[int]) -> str:
        return np.array(tokens, dtype=np.uint8).tobytes().decode(errors="replace")


GPT2_TOKENS = 50257


def coder_of(vocabulary: int) -> tuple[object, int]:
    """The coder of a run's tokens, and the number of tokens that it knows.

    A vocabulary may be padded beyond GPT-2's. Raises RunError for tokens that are neither bytes nor
    GPT-2's, and if GPT-2's vocabulary cannot be read.
    """
    if vocabulary <= 256:
        return Bytes(), vocabulary
    if vocabulary < GPT2_TOKENS:
        raise RunError(
            f"data.vocab_size={vocabulary} of this run is neither that of bytes, up to 256, nor "
            f"GPT-2's {GPT2_TOKENS}: use `generate` with tokens of your own"
        )
    try:
        return gpt2(), GPT2_TOKENS
    except VocabularyError as error:
        raise RunError(str(error)) from error


@torch.no_grad()
def generate(
    model: GPT,
    tokens: list[int],
    count: int,
    temperature: float,
    generator: torch.Generator,
    vocabulary: int | None = None,
) -> list[int]:
    """`count` tokens that follow `tokens`, drawn from softmax(logits / temperature).

    Only tokens below `vocabulary` are drawn: a model may have room for more than its data has.
    Raises RunError if `tokens` is empty or has others, and for logits that are not finite.
    """
    vocabulary = vocabulary or model.config.vocab_size
    if not tokens or not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise RunError(
            f"the prompt has the tokens {tokens[:9]}: give at least one, each from 0 to "
            f"{vocabulary - 1}"
        )
    text = torch.tensor([tokens])
    for _ in range(count):
        logits = model(text[:, -model.config.context :])[:, -1, :vocabulary].double()
        if not logits.isfinite().all():
            raise RunError("the model's logits are not finite: take an earlier checkpoint")
        # The largest exponent is 0, however low the temperature is.
        scaled = (logits - logits.max()) / temperature
        drawn = torch.multinomial(scaled.softmax(-1).float(), 1, generator=generator)
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
    if options.tokens < 1 or not options.prompt:
        parser.error("give a prompt and at least 1 token")
    if not 0 < options.temperature < math.inf:
        parser.error(f"--temperature={options.temperature} is not allowed: give a number above 0")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed={options.seed} is not allowed: give a whole number below 2^63")
    workers = Workers(alone=True)  # even if torchrun started several processes
    return workers.run(lambda: write(options))


def write(options: argparse.Namespace) -> int:
    model = load_model(options.run)
    coder, vocabulary = coder_of(OmegaConf.load(options.run / "config.yaml").data.vocab_size)
    generator = torch.Generator().manual_seed(options.seed)
    prompt = coder.encode_ordinary(options.prompt)
    drawn = generate(model, prompt, options.tokens, options.temperature, generator, vocabulary)
    print(coder.decode(prompt + drawn))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
