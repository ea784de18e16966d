"""Replayed messages: exact ones change nothing, and fewer bytes are further off."""

import pytest
import torch

from data.loader import WorkerBatches
from ef21_muon.compressors import Identity, QuantizedRank, TopK
from model import GPT
from scripts.shakespeare.replay import LAYERS, orthogonalised, replay, worker_gradients
from training.config import build, compose
from training.data import open_data


@pytest.fixture(scope="module")
def gradients():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(24, 8, generator=generator)
    return [mean + torch.randn(24, 8, generator=generator) for _ in range(40)]


def test_what_is_sent_whole_is_not_off(gradients):
    error, alignment = replay(gradients, Identity(), 0.2)
    assert error < 1e-6
    assert alignment == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", [TopK, QuantizedRank])
def test_the_less_is_sent_the_further_it_is_off(gradients, kind):
    measured = [replay(gradients, kind(fraction), 0.2) for fraction in (0.7, 0.4, 0.15)]
    errors, alignments = zip(*measured, strict=True)
    assert list(errors) == sorted(errors)
    assert list(alignments) == sorted(alignments, reverse=True)


def test_orthogonalised_has_singular_values_of_one():
    singular = torch.linalg.svdvals(orthogonalised(torch.randn(9, 5)))
    assert singular == pytest.approx(torch.ones(5), abs=1e-5)


def test_the_first_workers_gradients_are_kept(small):
    """The first round's by hand: the model's first weights, and one worker's half of a batch."""
    overrides = ("compressor@w2s=identity", "model.layers=3", "batch.global_size=4")
    config = compose((*small, *overrides)).config
    gradients = worker_gradients(config, 2)
    assert sorted(gradients) == sorted(LAYERS)
    assert all(len(of_layer) == 2 for of_layer in gradients.values())
    model = GPT(build(config.model, "model"), config.seed)
    windows = WorkerBatches(open_data(config)[0], config.model.context, 0, 2, config.seed)
    model(*windows.next(2)).backward()
    for name, of_layer in gradients.items():
        assert torch.allclose(of_layer[0], model.get_parameter(name).grad, atol=1e-6)
    assert gradients["blocks.2.mlp.project.weight"][0].any()
