"""The model against a NumPy forward pass written for these tests, and against its own promises."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from run import ROOT

from model import GPT, GPTConfig, rotary_tables, rotate

CONFIGS = ROOT / "configs" / "model"
SMALL = GPTConfig(layers=2, width=16, heads=2, context=12, vocab_size=11)


def random_tokens(config=SMALL, batch=3, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def trained(config=SMALL):
    """A model whose projections are not zero, so that every layer has a say."""
    model = GPT(config)
    torch.manual_seed(1)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def numpy_logits(model, sequence):
    """Logits (T, V) of one sequence in float64: one head and one position at a time."""
    config = model.config
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    head_width = config.width // config.heads

    def norm(x):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True))

    def turn(vector, position):
        half = head_width // 2
        pairs = vector[:half] + 1j * vector[half:]
        speeds = np.array([10000 ** (-2 * i / head_width) for i in range(half)])
        pairs = pairs * np.exp(1j * position * speeds)
        return np.concatenate([pairs.real, pairs.imag])

    x = norm(weights["embedding.weight"][sequence])
    for layer in range(config.layers):
        attention = f"blocks.{layer}.attention"
        normed, mixed = norm(x), np.zeros_like(x)
        query, key, value = (
            normed @ weights[f"{attention}.{part}.weight"].T for part in ("query", "key", "value")
        )
        for head in range(config.heads):
            own = slice(head * head_width, (head + 1) * head_width)
            for t in range(len(sequence)):
                turned = turn(norm(query[t, own]), t)
                scores = [turned @ turn(norm(key[s, own]), s) for s in range(t + 1)]
                shares = np.exp(np.array(scores) / math.sqrt(head_width))
                mixed[t, own] = shares / shares.sum() @ value[: t + 1, own]
        x = x + mixed @ weights[f"{attention}.project.weight"].T
        hidden = norm(x) @ weights[f"blocks.{layer}.mlp.expand.weight"].T
        x = x + (2 * np.maximum(hidden, 0) ** 2) @ weights[f"blocks.{layer}.mlp.project.weight"].T
    return norm(x) @ weights["embedding.weight"].T


def test_logits_and_loss_agree_with_numpy():
    model = trained()
    tokens, targets = random_tokens(), random_tokens(seed=1)
    expected = np.stack([numpy_logits(model, sequence) for sequence in tokens.numpy()])
    logits = model(tokens)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-5, atol=1e-5)

    chances = np.exp(expected) / np.exp(expected).sum(axis=-1, keepdims=True)
    of_targets = np.take_along_axis(chances, targets.numpy()[..., None], axis=-1)
    assert model(tokens, targets).item() == pytest.approx(-np.log(of_targets).mean(), rel=1e-5)


@pytest.mark.parametrize("name, parameters", [("tiny", 819_200), ("gpt2-124m", 123_568_128)])
def test_shipped_sizes(name, parameters):
    fields = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert fields.pop("_target_") == "model.GPTConfig"
    config = GPTConfig(**fields)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == parameters == config.parameter_count
    assert all(p.is_meta for p in model.parameters())


def test_a_later_token_does_not_change_earlier_logits():
    model, tokens = trained(), random_tokens()
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % SMALL.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=1e-6)
    assert (after[:, 7:] - before[:, 7:]).abs().amax(dim=-1).min() > 1e-3


def test_a_shorter_sequence_has_the_same_logits():
    model, tokens = trained(), random_tokens()
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5])


def test_rotated_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8).expand(-1, -1, 20, -1, -1)
    tables = rotary_tables(context=20, head_width=8)
    scores = rotate(query, *tables)[0, :, 0] @ rotate(key, *tables)[0, :, 0].T
    by_distance = [scores.diagonal(distance) for distance in range(-19, 20)]
    for diagonal in by_distance:
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert torch.stack([diagonal[0] for diagonal in by_distance]).unique().numel() == 39
    torch.testing.assert_close(scores[0, 0], (query[0, 0, 0] * key[0, 0, 0]).sum())


def test_fresh_model_predicts_almost_uniformly():
    config = GPTConfig(layers=2, width=64, heads=4, context=64, vocab_size=256)
    tokens, targets = random_tokens(config, 4, 64), random_tokens(config, 4, 64, seed=1)
    assert GPT(config)(tokens, targets).item() == pytest.approx(math.log(256), abs=0.1)


def test_every_block_starts_as_the_identity():
    model = GPT(SMALL)
    x = torch.randn(2, 12, SMALL.width, generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        assert torch.equal(block(x, model.cosine, model.sine), x)


def test_initial_scale_of_each_matrix():
    model = GPT(replace(SMALL, width=128, vocab_size=300))
    assert model.embedding.weight.std().item() == pytest.approx(1 / model.config.width, rel=0.05)
    for block in model.blocks:
        for layer in (block.attention.query, block.attention.key, block.attention.value):
            assert layer.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
        assert block.mlp.expand.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)


def test_seed_decides_the_weights():
    state = torch.random.get_rng_state()
    first, same, other = GPT(SMALL, seed=3), GPT(SMALL, seed=3), GPT(SMALL, seed=4)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
        if not name.endswith("project.weight"):
            assert not torch.equal(weight, other.state_dict()[name])

    torch.random.set_rng_state(state)
    torch.rand(5)
    same.init_weights(seed=4)
    assert torch.equal(same.embedding.weight, other.embedding.weight)


def test_every_parameter_is_a_matrix():
    parameters = list(trained().parameters())
    assert len(parameters) == 1 + 6 * SMALL.layers
    assert all(parameter.ndim == 2 for parameter in parameters)


def test_gradients_reach_every_parameter():
    model = trained()
    model(random_tokens(), random_tokens(seed=1)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


def test_embedding_learns_as_input_and_as_head():
    model = trained()
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    model(tokens, tokens + 1).backward()
    rows = model.embedding.weight.grad.abs().amax(dim=1)
    assert rows.min() > 0, "the head must reach the row of every token"

    without_input = trained()
    frozen = without_input.embedding.weight.detach().clone()
    without_input.embedding.forward = lambda ids: F.embedding(ids, frozen)
    without_input(tokens, tokens + 1).backward()
    difference = model.embedding.weight.grad - without_input.embedding.weight.grad
    assert difference[0].abs().max() > 1e-3, "the input must reach the row of its token"
    assert difference[1:].abs().max() < 1e-6


def test_bfloat16_autocast_stays_close_and_returns_float32():
    model, tokens, targets = trained(), random_tokens(), random_tokens(seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(tokens), model(tokens, targets)
    assert logits.dtype == loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(tokens, targets).item(), rel=0.02)
    assert not torch.equal(logits, model(tokens))


def test_rotary_tables_are_no_part_of_a_checkpoint():
    assert set(GPT(SMALL).state_dict()) == {name for name, _ in GPT(SMALL).named_parameters()}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": 0}, "model.layers is 0; it must be a positive integer"),
        ({"context": -1}, "model.context is -1; it must be a positive integer"),
        ({"vocab_size": 2.5}, "model.vocab_size is 2.5; it must be a positive integer"),
        ({"heads": True}, "model.heads is True; it must be a positive integer"),
        ({"heads": 3}, r"width is 16 with 3 heads; width must be a multiple of 2 \* heads = 6"),
        ({"heads": 16}, r"width is 16 with 16 heads; width must be a multiple of 2 \* heads = 32"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as error:
        replace(SMALL, **change)
    assert "\n" not in str(error.value)


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="has 13 tokens; the model's context is 12"):
        GPT(SMALL)(random_tokens(length=13))


def test_blocks_that_are_computed_again_have_the_same_gradients_in_less_memory():
    tokens, gradients, kept = random_tokens(), [], []
    for again in (False, True):
        model = trained(replace(SMALL, activation_checkpointing=again))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            loss = model(tokens, tokens)
            before = sum(saved)
            loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept.append(before)
    assert all(map(torch.equal, *gradients))
    assert kept[1] < kept[0] / 3
    with pytest.raises(
        ValueError, match=r"model.activation_checkpointing is 1: give true or false"
    ):
        replace(SMALL, activation_checkpointing=1)
