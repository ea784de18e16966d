"""Sessions in environments of their own: `pipx run nox -l` lists them; pytest gets what follows --.

`.venv` has one Python and one torch. Here the suite runs on the oldest and the newest Python that
torch has wheels for, with the oldest torch that pyproject.toml allows, and under coverage.
"""

from pathlib import Path

import nox

PYTHONS = ("3.11", "3.14")
PYTEST = ("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = True


@nox.session(python=PYTHONS[0])
def lint(session: nox.Session) -> None:
    """What `make lint` does."""
    install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "ef21_muon", "tests/typed_user.py")
    session.run("python", "tests/support/check_links.py")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The test suite."""
    install(session)
    run_tests(session, *PYTEST)


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """The test suite with the oldest torch that pyproject.toml allows."""
    (torch,) = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    install(session, torch.replace(">=", "=="))
    run_tests(session, *PYTEST)


@nox.session(python=PYTHONS[0])
def coverage(session: nox.Session) -> None:
    """Which lines the test suite runs, in all processes that it starts."""
    install(session, "coverage")
    session.run("coverage", "erase")
    run_tests(session, "coverage", "run", *PYTEST[1:])
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


def install(session: nox.Session, *more: str) -> None:
    """Install this project for tests, in pinned versions, but for what is in `more`."""
    names = {requirement.partition("==")[0] for requirement in more}
    pins = Path("constraints.txt").read_text().splitlines()
    constraints = Path(session.virtualenv.location, "constraints.txt")
    constraints.write_text("\n".join(pin for pin in pins if pin.partition("==")[0] not in names))
    session.install("--constraint", str(constraints), "--editable", ".[train,test]", *more)


def run_tests(session: nox.Session, *command: str) -> None:
    session.run(*command, *session.posargs, env={"OMP_NUM_THREADS": "1"})
