"""Errors of classes that a configuration names, in one line: what went wrong, and where."""

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ef21_muon
from training.workers import RunError, one_line

ROOT = Path(__file__).resolve().parent.parent
# The errors of this code say themselves what they were given.
OWN = (
    *(ROOT / name for name in ("training", "baselines", "data", "model.py", "train.py")),
    Path(ef21_muon.__file__).resolve().parent,
)
PYTHON = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))


def cause_of(error: BaseException) -> str:
    """The reason for an error that Hydra has raised for a class: why, where, and what to do."""
    cause = error.__cause__ or error
    if isinstance(cause, ImportError) and cause.__cause__:  # Hydra's own error for a failed import
        root, message = cause.__cause__, _first_line(cause).removesuffix(":")
        place = _place(root)
        if place or not isinstance(root, ImportError | AttributeError):
            where = f", {place}" if place else ""
            return f"{message} ({_named(root)}{where}): mend that file, or install what it needs"
        return f"{message}: give the dotted name of a class that can be imported"
    place = _place(cause)
    if place is None or (_is_own(place) and isinstance(cause, TypeError)):
        hint = ": give what that class takes, see train.py --cfg"
        return _first_line(cause) + (hint if isinstance(cause, TypeError) else "")
    if _is_own(place) and isinstance(cause, ValueError):
        return _first_line(cause).removesuffix(":")
    return f"{_named(cause)} ({place})"


@contextmanager
def explained(key: str) -> Iterator[None]:
    """Inside it, errors of a class that `key` names become RunErrors; those of this code stay."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        place = _place(error)
        if place and not _is_own(place):
            raise RunError(f"{key}: {_named(error)} ({place})") from error
        if isinstance(error, TypeError) and _raised_by_call(error):
            raise RunError(f"{key}: {one_line(error)}: give a class that takes it") from error
        raise


def _raised_by_call(error: BaseException) -> bool:
    """Whether the call failed before the function began, as for a wrong argument."""
    path = traceback.extract_tb(error.__traceback__)[-1].filename
    return _of_hydra(path) or Path(path).resolve().is_relative_to(ROOT / "training")


def _named(error: BaseException) -> str:
    message = one_line(error)
    if isinstance(error, SyntaxError):
        message = error.msg
    kind = type(error).__name__
    return kind if message == kind else f"{kind}: {message}"


def _place(error: BaseException) -> str | None:
    """The file and line that raised an error: the last one outside of libraries, if there is one.

    None for an error that the call itself raised.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not (frame.filename.startswith("<frozen") or _of_hydra(frame.filename))
        and frame.name != "__getattr__"  # the attribute was asked for one frame before
    ]
    written_here = [frame for frame in frames if not is_installed(frame.filename)]
    if not frames:
        return None
    frame = (written_here or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def is_installed(path: str) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    installed = {"site-packages", "dist-packages"}.intersection(path.split(os.sep))
    return bool(installed) or path.startswith(PYTHON)


def _of_hydra(path: str) -> bool:
    return not {"hydra", "importlib"}.isdisjoint(Path(path).parts)


def _is_own(place: str) -> bool:
    path = Path(place.rpartition(":")[0]).resolve()
    return any(path.is_relative_to(own) for own in OWN)


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
