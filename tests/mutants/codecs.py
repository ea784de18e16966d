"""Faults of compressors and value formats: indices, scales, rounding, bits, and random numbers."""

from tests.mutants.mutation import Mutation

INDICES = "ef21_muon/compressors/indices.py"
SELECTION = "ef21_muon/compressors/selection.py"
SPARSE = "ef21_muon/compressors/sparse.py"
LOW_RANK = "ef21_muon/compressors/low_rank.py"
BASE = "ef21_muon/compressors/base.py"
RARE = "ef21_muon/compressors/rare.py"
VALUES = "ef21_muon/values/base.py"
SCALED = "ef21_muon/values/scaled.py"
LEVELS = "ef21_muon/values/levels.py"

OF_COMPRESSORS = [
    Mutation(
        "places of indices begin again with every piece of a large matrix",
        INDICES,
        "torch.arange(first, first + piece.shape[1], device=indices.device)",
        "torch.arange(piece.shape[1], device=indices.device)",
        "ef21_muon/compressors/test_pieces.py ef21_muon/compressors/test_bits.py",
    ),
    Mutation(
        "entries equal to the smallest that is kept are counted anew in every piece",
        SELECTION,
        "        missing = missing - place[:, -1:]\n",
        "",
        "ef21_muon/compressors/test_selection.py",
    ),
    Mutation(
        "the entry after the k-th largest is taken for it",
        SELECTION,
        "found = (at_least >= missing)",
        "found = (at_least > missing)",
        "ef21_muon/compressors/test_selection.py",
    ),
    Mutation(
        "a random walk never begins at the last entry",
        SPARSE,
        "torch.randint(x.shape[1], (len(x), 1)",
        "torch.randint(max(1, x.shape[1] - 1), (len(x), 1)",
        "ef21_muon/compressors/test_pieces.py",
    ),
    Mutation(
        "strides of random walks are not coprime to the entries, so that some repeat",
        SPARSE,
        "if gcd(n, total) == 1) for start in starts]",
        "if gcd(n, total) >= 1) for start in starts]",
        "ef21_muon/compressors/test_compressors.py",
    ),
    Mutation(
        "chunks lie in a grid of the wrong width",
        SPARSE,
        "rows = chunk // self.grid[1] * tall",
        "rows = chunk // self.grid[0] * tall",
        "ef21_muon/compressors/test_chunks.py",
    ),
    Mutation(
        "of small chunks too few entries are kept: cut, not rounded",
        SPARSE,
        "max(1, round(self.k * size / self.chunk**2))",
        "max(1, int(self.k * size / self.chunk**2))",
        "ef21_muon/compressors/test_chunks.py",
    ),
    Mutation(
        "a fraction is cut, not rounded",
        SPARSE,
        "return max(1, round(self.fraction * total))",
        "return max(1, int(self.fraction * total))",
        "ef21_muon/compressors/test_compressors.py ef21_muon/compressors/test_quantized_rank.py",
    ),
    Mutation(
        "sketches draw from torch's global generator",
        LOW_RANK,
        "sketch = torch.randn(size, generator=generator, dtype",
        "sketch = torch.randn(size, dtype",
        "ef21_muon/compressors/test_compressors.py ef21_muon/test_optimizer.py",
    ),
    Mutation(
        "least-squares rows are damped a thousand times more",
        LOW_RANK,
        "ridge = 1e-5 * gram",
        "ridge = 1e-2 * gram",
        "ef21_muon/compressors/test_quantized_rank.py",
    ),
    Mutation(
        "the bases of a GPU are made orthogonal once less",
        LOW_RANK,
        "    for _ in range(3):\n",
        "    for _ in range(2):\n",
        "ef21_muon/compressors/test_basis.py",
    ),
    Mutation(
        "a compressor that saves no byte is used all the same",
        BASE,
        "self.payload_bytes(m, n) < self.values.payload_bytes(m, n)",
        "self.payload_bytes(m, n) <= self.values.payload_bytes(m, n)",
        "ef21_muon/compressors/test_compressors.py ef21_muon/compressors/test_chunks.py",
    ),
    Mutation(
        "all workers draw the same random numbers",
        BASE,
        'f"{seed}/{stream}/{purpose}"',
        'f"{seed}/{purpose}"',
        "ef21_muon/transport/test_alone.py ef21_muon/test_fleet.py ef21_muon/test_algorithm.py",
    ),
    Mutation(
        "random numbers do not depend on the seed",
        BASE,
        'f"{seed}/{stream}/{purpose}"',
        'f"{stream}/{purpose}"',
        "ef21_muon/transport/test_alone.py ef21_muon/test_optimizer.py ef21_muon/test_options.py"
        " ef21_muon/test_algorithm.py training/test_resume.py",
    ),
    Mutation(
        "the mean over senders is over all workers",
        BASE,
        "total += received.div_(senders.clamp_(min=1))",
        "total += received.div_(len(messages))",
        "ef21_muon/test_senders.py",
    ),
    Mutation(
        "a scaled compressor does not scale",
        RARE,
        "return self.compressor.decode(payload, m, n).mul_(self._scale(m, n))",
        "return self.compressor.decode(payload, m, n)",
        "ef21_muon/compressors/test_rare.py",
    ),
    Mutation(
        "a message is left out with the probability of sending it",
        RARE,
        "sent = (draws < self.probability)",
        "sent = (draws >= self.probability)",
        "ef21_muon/compressors/test_rare.py",
    ),
]

OF_VALUES = [
    Mutation(
        "natural compression rounds down whatever lies in the middle",
        VALUES,
        "return torch.full_like(bits, MANTISSA // 2)",
        "return torch.full_like(bits, MANTISSA // 2 - 1)",
        "ef21_muon/values/test_middle.py ef21_muon/values/test_values.py",
    ),
    Mutation(
        "natural compression is unbiased for half of the mantissas only",
        VALUES,
        "            MANTISSA, bits.shape, generator=generator,",
        "            MANTISSA // 2, bits.shape, generator=generator,",
        "ef21_muon/values/test_values.py",
    ),
    Mutation(
        "the high bits of codes of more than 16 are one byte too low",
        VALUES,
        "codes = codes.to(torch.int64) << 8 * planes",
        "codes = codes.to(torch.int64) << 8",
        "ef21_muon/compressors/test_bits.py",
    ),
    Mutation(
        "integers are rounded to the nearest though they should be dithered",
        SCALED,
        "torch.rand(steps.shape, **options) if self.unbiased else 0.5",
        "0.5",
        "ef21_muon/values/test_values.py",
    ),
    Mutation(
        "signs have the largest magnitude for a scale, not the mean",
        SCALED,
        "return values.abs().mean(2, keepdim=True)",
        "return values.abs().amax(2, keepdim=True)",
        "ef21_muon/values/test_values.py ef21_muon/compressors/test_compressors.py",
    ),
    Mutation(
        "columns of zeros become NaN in a diagonal geometry",
        SCALED,
        "return largest.masked_fill(largest == 0, 1).double().sqrt().float()[:, None]",
        "return largest.double().sqrt().float()[:, None]",
        "ef21_muon/values/test_rowcol.py",
    ),
    Mutation(
        "normal levels have the root mean square for a scale, not the least-squares one",
        LEVELS,
        "return (fit * largest).to(self.scale_dtype).float()",
        "return (rms * largest).to(self.scale_dtype).float()",
        "ef21_muon/values/test_levels.py",
    ),
    Mutation(
        "rotations are undone in the order in which they were made",
        LEVELS,
        "for part, signs in reversed(parts) if back else parts:",
        "for part, signs in parts:",
        "ef21_muon/values/test_levels.py",
    ),
    Mutation(
        "the standard deviation of a block is the biased one",
        LEVELS,
        "correction=min(1, length - 1))",
        "correction=0)",
        "ef21_muon/values/test_statistical.py",
    ),
    Mutation(
        "bins lie half a bin too low",
        LEVELS,
        "(unit / scale).add_(self.bins // 2)",
        "(unit / scale).add_((self.bins - 1) / 2)",
        "ef21_muon/values/test_statistical.py",
    ),
]

MUTATIONS = [*OF_COMPRESSORS, *OF_VALUES]
