"""The GPT that the Muon, Scion and EF21-Muon line of work trains, in one file.

A decoder with rotary positions, normalised queries and keys, RMSNorm without parameters, squared
ReLU, and one matrix that is both the token embedding and the output head. Every parameter is a
matrix, so a linear minimisation oracle over a matrix norm covers the whole model; queries, keys and
values are three layers because each of them is one matrix to such an oracle.

Shapes in the comments: B sequences, T tokens each, width C, H heads of D = C / H, vocabulary V.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROTARY_BASE = 10_000


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT.

    Args:
        layers: the number of blocks.
        width: the number of channels C.
        heads: the number of attention heads H.
        context: the most tokens that attention looks back on, the current one included.
        vocab_size: the number of token ids V.
        activation_checkpointing: whether a backward pass computes every block's activations again,
            so that only the input of the block is kept.

    Raises:
        ValueError: for a size that is not a positive integer, and for a width that `heads` does not
            divide into heads of even size (rotary embeddings turn channels in pairs).
    """

    layers: int
    width: int
    heads: int
    context: int
    vocab_size: int
    activation_checkpointing: bool = False

    def __post_init__(self):
        if type(self.activation_checkpointing) is not bool:
            raise ValueError(
                f"model.activation_checkpointing is {self.activation_checkpointing!r}: give true "
                "or false"
            )
        sizes = (field for field in fields(self) if field.type is int)
        for field in sizes:
            size = getattr(self, field.name)
            if type(size) is not int or size < 1:
                raise ValueError(
                    f"model.{field.name} is {size!r}; it must be a positive integer: change it"
                )
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width is {self.width} with {self.heads} heads; width must be a multiple "
                f"of 2 * heads = {2 * self.heads}: change model.width or model.heads"
            )

    @property
    def parameter_count(self) -> int:
        """The number of parameters: the embedding, and 12 C^2 per block (4 attention, 8 MLP)."""
        return self.vocab_size * self.width + 12 * self.layers * self.width**2


def rms_norm(x: Tensor) -> Tensor:
    """Scale the last dimension of `x` to root mean square 1."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(context: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (context, 1, head_width / 2) float32, of the rotary angles.

    Pair i of the channels turns by base^(-2 i / head_width) radians per position (RoFormer,
    arXiv:2104.09864, section 3.2).
    """
    speeds = ROTARY_BASE ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles = torch.arange(context, dtype=torch.float32)[:, None, None] * speeds
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of `x` (B, T, H, D) by the angles of their positions.

    `cosine` and `sine` are the first T rows of `rotary_tables`. The dot product of two rotated
    vectors depends on their positions through the distance alone.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with normalised, rotated queries and keys: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, config.width, bias=False)
        self.value = nn.Linear(config.width, config.width, bias=False)
        self.project = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        by_head = (*x.shape[:2], self.heads, -1)  # (B, T, H, D)
        value = self.value(x).view(by_head)
        query = rotate(rms_norm(self.query(x).view(by_head)), cosine, sine).to(value.dtype)
        key = rotate(rms_norm(self.key(x).view(by_head)), cosine, sine).to(value.dtype)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        return self.project(mixed.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """The position-wise half of a block: (B, T, C) -> (B, T, C).

    ReLU is scaled by sqrt(2), which keeps the mean square of a symmetric input (Scion,
    arXiv:2502.07529), and then squared (Primer, arXiv:2109.08668).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.expand = nn.Linear(config.width, 4 * config.width, bias=False)
        self.project = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project((math.sqrt(2) * F.relu(self.expand(x))).square())


class Block(nn.Module):
    """Attention, then MLP, each on normalised input and added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.attention(rms_norm(x), cosine, sine)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """A decoder-only language model whose head is its token embedding.

    `seed` fixes the initial weights on any device. Under `torch.device("meta")` the model has
    shapes but no values, which is enough to count, plan and shard it. After `to_empty`, call
    `init_weights` to draw the values.
    """

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        sizes = config.context, 1, config.width // config.heads // 2
        self.register_buffer("cosine", torch.empty(sizes, dtype=torch.float32), persistent=False)
        self.register_buffer("sine", torch.empty(sizes, dtype=torch.float32), persistent=False)
        if not self.embedding.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(
        self, seed: int, fill: Callable[[Tensor, Tensor], object] = Tensor.copy_
    ) -> None:
        """Draw the weights from a new generator, and compute the rotary tables.

        Embedding: normal, standard deviation 1 / C, so that a token's own logit starts at 1.
        Output projections: zero, so that every block starts as the identity. Other hidden
        matrices: normal, standard deviation 1 / sqrt(d_in). The matrices are drawn whole, one after
        the other, on the CPU. `fill(weight, values)` copies each to where this process holds it, or
        holds some rows of it.
        """
        tables = rotary_tables(self.config.context, self.config.width // self.config.heads)
        for buffer, table in zip((self.cosine, self.sine), tables, strict=True):
            buffer.copy_(table)
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("project.weight"):
                fill(weight, torch.zeros(weight.shape, device="cpu"))
                continue
            power = 1 if weight is self.embedding.weight else 0.5
            deviation = weight.size(1) ** -power
            values = torch.randn(weight.shape, generator=generator, device="cpu")
            fill(weight, values.mul_(deviation))
            del values  # frees them before the next ones are drawn

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) float32 of `tokens` (B, T) int64, or their loss against `targets`.

        The loss is the mean cross-entropy in nats per token, a float32 scalar; `targets` has the
        shape of `tokens`. Raises ValueError when T is more than the context.
        """
        length = tokens.size(1)
        if length > self.config.context:
            raise ValueError(
                f"a sequence has {length} tokens; the model's context is {self.config.context}: "
                "cut the sequence or raise model.context"
            )
        cosine, sine = self.cosine[:length], self.sine[:length]
        x = self.embed(tokens)
        for block in self.blocks:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cosine, sine, use_reentrant=False)
            else:
                x = block(x, cosine, sine)
        return self.head(x, targets)

    def embed(self, tokens: Tensor) -> Tensor:
        """The input of the first block (B, T, C)."""
        return rms_norm(self.embedding(tokens))

    def head(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """What `forward` returns, from the output of the last block."""
        logits = F.linear(rms_norm(x), self.embedding.weight).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
