"""The norm of a linear map that is made of blocks, as that of a grouped convolution is."""

from torch import Generator, Tensor

from ef21_muon.lmo.norms import Norm


class Blocks(Norm):
    """max over the blocks Z_b of norm(Z_b); the LMO is that of every block, the dual is their sum.

    Z has `count` blocks of rows below each other, or, with `columns`, of columns side by side. As
    a linear map each acts on inputs of its own and has outputs of its own, so that its operator
    norms are the largest of the blocks', and the matrix Z is only how the blocks are stored.

    norm: of a block. Raises ValueError for a count below 1, and RuntimeError from `lmo` and `dual`
    where it does not divide the rows, or columns.
    """

    def __init__(self, norm: Norm, count: int, columns: bool = False):
        super().__init__()
        if not (type(count) is int and count >= 1):
            raise ValueError(f"Blocks got count={count}: give at least 1 block")
        self.norm, self.count, self.columns = norm, count, columns

    def lmo(self, gradient: Tensor) -> Tensor:
        return self._whole(self.norm.lmo(self._blocks(gradient)))

    def dual(self, gradient: Tensor) -> Tensor:
        return self.norm.dual(self._blocks(gradient)).sum(-1)

    def projected(self, wanted: Tensor) -> Tensor:
        """The same of every block."""
        return self._whole(self.norm.projected(self._blocks(wanted)))

    def init_(self, weight: Tensor, generator: Generator | None = None) -> Tensor:
        """Fill every block with a random extreme point of its unit ball."""
        blocks = self.norm.init_(self._blocks(weight).contiguous(), generator)
        return weight.copy_(self._whole(blocks))

    def exact(self) -> Norm:
        return Blocks(self.norm.exact(), self.count, self.columns)

    def cost(self, d_out: int, d_in: int) -> int:
        rows, columns = (1, self.count) if self.columns else (self.count, 1)
        return self.count * self.norm.cost(d_out // rows, d_in // columns)

    def _blocks(self, matrices: Tensor) -> Tensor:
        """(..., m, n) -> (..., count, rows, columns)."""
        if self.columns:
            return matrices.unflatten(-1, (self.count, -1)).transpose(-3, -2)
        return matrices.unflatten(-2, (self.count, -1))

    def _whole(self, blocks: Tensor) -> Tensor:
        """Back."""
        if self.columns:
            return blocks.transpose(-3, -2).flatten(-2)
        return blocks.flatten(-3, -2)
