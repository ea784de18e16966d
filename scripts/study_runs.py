"""The runs of the study in results/shakespeare, as overrides of `experiment=shakespeare`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StudyRun:
    """A run: where its log goes, below results/shakespeare, and what it overrides."""

    name: str
    overrides: tuple[str, ...]


GRID = ("compressor@w2s=identity", "steps=300")


def uncompressed_grid() -> list[StudyRun]:
    """Radii and beta of the uncompressed run, on half the steps; everything else takes its best."""
    radii = [
        StudyRun(
            f"grid/identity-hidden{hidden:g}-embedding{embedding:g}-beta0.1",
            (*GRID, f"norm.hidden.radius={hidden:g}", f"norm.embedding.radius={embedding:g}"),
        )
        for hidden in (0.5, 1, 2)
        for embedding in (30, 60, 120)
    ]
    return radii


RUNS = uncompressed_grid()
