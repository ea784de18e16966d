"""On a GPU: the numbers of the CPU, and steps that do not make the host wait."""

import pytest
import torch
from torch.nn import Parameter

from baselines import DeMo, Dion
from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import (
    Bernoulli,
    ChunkTopK,
    Identity,
    Quantize,
    QuantizedRank,
    RandK,
    RankK,
    Scaled,
    TopColumns,
    TopK,
)
from ef21_muon.norms import Sign
from ef21_muon.norms.newton_schulz import newton_schulz
from ef21_muon.transport.agreement import fingerprint

pytestmark = pytest.mark.cuda

COMPRESSORS = {
    "identity": Identity(),
    "chunks": ChunkTopK(8, 8, "statistical2"),
    "scaled": Scaled(Quantize("int4")),
    "natural": Quantize("natural"),
    "natural4": Quantize("natural4"),
    "normal2": Quantize("normal2"),
    "sign": Quantize("sign"),
    "smooth": Quantize("rowcol4"),
    "bfloat16": Quantize("bfloat16"),
    "statistical": Quantize("statistical4"),
    "bernoulli": Bernoulli(TopK(0.3), 0.5),
    "quantized rank": QuantizedRank(0.3),
    "randk": RandK(0.3, "natural4"),
    "rank": RankK(0.3, "int4"),
    "columns": TopColumns(0.3),
    "topk": TopK(0.2),
    "topk signs": TopK(0.2, "sign"),
}
SHAPES = ((3, 64, 48), (1, 700, 96))  # the second has rows that are not sorted whole
OPTIMIZERS = {
    **{
        f"{name} both ways": lambda parameters, c=compressor: EF21Muon(
            parameters, lr=0.02, w2s=c, s2w=c, weight_decay=0.1
        )
        for name, compressor in COMPRESSORS.items()
    },
    "nesterov": lambda parameters: EF21Muon(parameters, nesterov=True, norm=Sign()),
    "local": lambda parameters: LocalSteps(
        EF21Muon(parameters, process_group=ALONE), sync_every=1, w2s=TopK(0.3), outer_momentum=0.3
    ),
    "averaged": lambda parameters: AveragedGradients(torch.optim.AdamW(parameters), w2s=TopK(0.1)),
    "dion": lambda parameters: Dion(parameters, rank_fraction=0.25),
    "demo": lambda parameters: DeMo(parameters),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_message_decodes_on_the_gpu_as_on_the_cpu(name, shape):
    """Wherever it was encoded; products of matrices are rounded otherwise."""
    compressor = COMPRESSORS[name].fit(*shape[1:])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for device in ("cpu", "cuda"):
        generator = torch.Generator(device).manual_seed(1)
        message = compressor.encode(x.to(device), generator)
        assert message.shape == (len(x), compressor.payload_bytes(*shape[1:]))
        here = compressor.decode(message.cpu(), *shape[1:])
        there = compressor.decode(message.cuda(), *shape[1:]).cpu()
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["topk", "topk signs", "columns", "natural4", "bfloat16"])
def test_a_message_is_as_near_as_that_of_the_cpu(name):
    compressor, x = COMPRESSORS[name], torch.randn(2, 700, 96)
    errors = []
    for device in ("cpu", "cuda"):
        message = compressor.encode(x.to(device), torch.Generator(device).manual_seed(0))
        decoded = compressor.decode(message, 700, 96).cpu()
        errors.append((torch.linalg.norm(decoded - x) / torch.linalg.norm(x)).item())
    assert errors[0] == pytest.approx(errors[1], rel=0.02, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 64, 64), (2, 96, 32), (2, 32, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_newton_schulz_is_that_of_the_cpu(shape, dtype):
    x = torch.randn(shape)
    found, expected = newton_schulz(x.cuda(), dtype=dtype).cpu(), newton_schulz(x)
    tolerance = 0.02 if dtype is torch.bfloat16 else 1e-3
    assert torch.linalg.norm(found - expected) < tolerance * torch.linalg.norm(expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_makes_the_host_wait(name):
    parameters = [Parameter(torch.randn(s, device="cuda")) for s in ((64, 48), (64, 48), (96, 700))]
    optimizer = OPTIMIZERS[name](parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    for _ in range(2):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


EXACT = [name for name in COMPRESSORS if name not in ("quantized rank", "rank")]


@pytest.mark.parametrize("name", EXACT)
def test_a_gpu_decodes_to_the_bits_of_a_cpu(name):
    """So both may be in one run; of what has no matrix product."""
    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        message = COMPRESSORS[name].encode(x)
        decoded = COMPRESSORS[name].decode(message, *shape[1:])
        on_gpu = COMPRESSORS[name].decode(message.cuda(), *shape[1:])
        assert torch.equal(on_gpu.cpu(), decoded)
        assert fingerprint(on_gpu).item() == fingerprint(decoded).item()
