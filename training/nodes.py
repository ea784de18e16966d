"""What has to be the same on all nodes: code, torch, classes, tokens, and the run's directory.

All workers compare these before the training. The error for a difference names a rank, its host,
and what to do.
"""

import hashlib
import secrets
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from omegaconf import DictConfig, ListConfig

from data.loader import TokenStream
from training.causes import is_installed
from training.workers import RunError, Workers

CODE = {"__main__", "train", "model", "training", "baselines", "data", "ef21_muon"}
SEEN_WITHIN = 10.0  # seconds until a file written on one node has to be visible on another


def require_same_code(workers: Workers) -> None:
    """Raise RunError if ranks have different versions of torch or different code."""
    loaded = [name for name in sys.modules if name.partition(".")[0] in CODE]
    everywhere = set.intersection(*map(set, workers.gather(loaded)))
    facts = {"torch": torch.__version__.partition("+")[0]}  # without the build, such as +cpu
    for name in sorted(everywhere):
        facts[name.replace("__main__", "train")] = _digest(name) or ""
    _require_same(facts, workers, "use the same code and the same torch on all nodes")


def require_same_inputs(
    config: DictConfig, streams: dict[str, TokenStream], workers: Workers
) -> None:
    """Raise RunError if tokens differ, or the files of classes that the configuration names.

    Numbers and samples of the tokens are compared. The classes have to be imported already.
    """
    if workers.count > 1:
        everywhere = set.intersection(*map(set, workers.gather([*_modules_of_users()])))
        facts = workers.together(lambda: _inputs(config, streams, everywhere))
        _require_same(facts, workers, "use the same data and code on all nodes")


def require_shared(directory: Path, workers: Workers) -> None:
    """Raise RunError if a rank does not see rank 0's run directory, or may not write into it.

    Every rank writes a file into it and removes it again, once rank 0 has looked for all files.
    """
    if workers.count == 1:
        return
    folder = directory / "checkpoints"
    if not workers.broadcast(workers.first and folder.is_dir()):
        folder = directory
    # Named like an unfinished file: if the process ends here, the next start removes it.
    token = workers.broadcast(secrets.token_hex(4))
    names = [f"shared.{rank}-{token}.partial" for rank in range(workers.count)]
    problem = None
    try:
        (folder / names[workers.rank]).touch()
    except OSError as error:
        problem = error.strerror
    try:
        places = workers.gather((socket.gethostname(), _absolute(folder), problem))
        patience = min(SEEN_WITHIN, workers.timeout.total_seconds() / 2)  # the others wait
        missing = workers.broadcast(_not_seen(folder, names, patience) if workers.first else None)
    finally:
        with suppress(OSError):
            (folder / names[workers.rank]).unlink()
    if missing:
        host, path, problem = places[missing[0]]
        more = f", like {len(missing) - 1} more," if missing[1:] else ""
        what = f"{path} there: {problem}" if problem else f"{path} there is another folder"
        raise RunError(
            f"rank {missing[0]} on {host}{more} does not share the run directory {places[0][1]} of "
            f"rank 0 on {places[0][0]} ({what}): give one with directory= or runs= that all nodes "
            "share and may write"
        )


def _absolute(folder: Path) -> str:
    try:
        return str(folder.resolve())
    except OSError:  # the working directory is gone
        return str(folder)


def _not_seen(folder: Path, names: list[str], patience: float) -> list[int]:
    """The ranks whose files are still missing after `patience` seconds."""
    until = time.monotonic() + patience
    while missing := [rank for rank, name in enumerate(names) if not (folder / name).exists()]:
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    return missing


def _modules_of_users() -> Iterator[str]:
    """The loaded modules that belong neither to Python nor to a package nor to this code."""
    for name, module in [*sys.modules.items()]:
        path = getattr(module, "__file__", None)
        of_code = name.partition(".")[0] in CODE
        if isinstance(path, str) and not (of_code or is_installed(path)):
            yield name


def _inputs(
    config: DictConfig, streams: dict[str, TokenStream], modules: Iterable[str]
) -> dict[str, str]:
    facts = {name: _digest(name) or "" for name in [*_targets(config), *sorted(modules)]}
    for name, stream in streams.items():
        for place, (path, content) in enumerate(stream.fingerprints(), 1):
            facts[f"{name} shard {place}, {path.name}"] = content
    return facts


def _targets(node: object) -> Iterator[str]:
    """The names of the classes in a configuration."""
    if isinstance(node, DictConfig):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, list | ListConfig):
        for one in node:
            yield from _targets(one)


def _digest(name: str) -> str | None:
    """The hash of the file of a module, or of the module that has a dotted name.

    None if there is no file.
    """
    while name not in sys.modules and "." in name:
        name = name.rpartition(".")[0]
    path = getattr(sys.modules.get(name), "__file__", None)
    with suppress(OSError, TypeError):
        return f"SHA-256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
    return None


def _require_same(facts: dict[str, str], workers: Workers, remedy: str) -> None:
    """Raise RunError, on all workers, with the first rank that differs from rank 0, and how."""
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    if len({*workers.gather(digest)}) == 1:
        return
    (first_host, first), *others = workers.gather((socket.gethostname(), facts))
    for rank, (host, theirs) in enumerate(others, 1):
        if names := [n for n in first | theirs if first.get(n) != theirs.get(n)]:
            more = f", and {len(names) - 1} more" if names[1:] else ""
            raise RunError(
                f"nodes differ in {names[0]}: {theirs.get(names[0], 'none')} on rank {rank} "
                f"({host}), {first.get(names[0], 'none')} on rank 0 ({first_host}){more}: {remedy}"
            )
