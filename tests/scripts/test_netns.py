"""Jobs over namespaces: bytes as the kernel counts them, limits, failures, nothing left behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nodes import in_node, namespaces, processes, seconds_to_send
from run import PATIENCE, ROOT
from waiting import wait_until

from ef21_muon.layers import PLACEMENTS
from scripts.count_bytes import HEADERS, check_launch
from scripts.netns import ETHERNET_HEADER, MTU, JobError, Network, requirements_missing
from scripts.studies import read_records
from training.workers import RunError, Workers

MISSING = requirements_missing()
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.usefixtures("forks"),
]

SCRIPTS = ROOT / "scripts"
# 1.3 million parameters: every rank sends over 1 MB per step, whatever the placement.
LOCAL = ["optimizer=local", "optimizer.sync_every=2"]
WIDENED = ["model.layers=4", "model.width=160", "compressor@w2s=natural"]
SLEEP = (
    f"import os, time; print('ready', os.environ.get('RANK'), flush=True); time.sleep({PATIENCE})"
)
SHOW_LINK = "import os; os.execlp('ip', 'ip', 'link', 'show', 'eth0')"


def count(nodes: int, overrides: list[str], out: Path, servers=PLACEMENTS, ranks=1, steps=3):
    """The rows that scripts/count_bytes.py writes, and what it prints."""
    batch = f"batch.global_size={nodes * ranks}"
    options = [f"--servers={','.join(servers)}", f"--steps={steps}", f"--out={out}"]
    script = SCRIPTS / "count_bytes.py"
    with Network(nodes) as network:
        printed, *_ = network.torchrun(
            script, *options, *overrides, batch, ranks_per_node=ranks, timeout=PATIENCE
        )
    return read_records(out / "count.jsonl"), printed


@pytest.mark.parametrize(
    ("nodes", "every", "method", "servers"),
    [
        pytest.param(2, 1, [], PLACEMENTS, id="2"),
        pytest.param(3, 1, [], PLACEMENTS, id="3", marks=pytest.mark.slow),
        pytest.param(2, 2, LOCAL, PLACEMENTS, id="2-local", marks=pytest.mark.slow),
        pytest.param(3, 2, LOCAL, PLACEMENTS, id="3-local", marks=pytest.mark.slow),
        pytest.param(3, 2, LOCAL, ["rank0"], id="3-local-rank0"),
    ],
)
def test_kernel_confirms_the_log(nodes, every, method, servers, small, tmp_path, nothing_left):
    """Within 3 % for what a rank sends, where that is over 1 MB per round.

    Acknowledgements of what a rank receives count as sent. A rank that receives many times what it
    sends would miss the bar by them; here the worst is `rank0`, where a worker receives 3.6 times.
    """
    overrides, steps = [*small, *WIDENED, *method], every * (4 - every)
    rows, printed = count(nodes, overrides, tmp_path, servers, steps=steps)
    expected = [(server, rank) for server in servers for rank in range(nodes)]
    assert [(row["server"], row["rank"]) for row in rows] == expected
    for row in rows:
        log, kernel, packets = row["log_bytes"], row["kernel_bytes"], row["kernel_packets"]
        assert every * log > 1e6
        assert log < kernel < 1.03 * log, row
        assert log <= kernel - HEADERS * packets < 1.01 * log, row
        assert kernel <= packets * (MTU + ETHERNET_HEADER), "frames were counted unsegmented"
        assert re.search(rf"{row['server']} +{row['rank']} +{log / 1e6:.3f} ", printed)


@pytest.mark.slow
def test_a_node_of_two_ranks_sends_what_one_would(small, tmp_path, nothing_left):
    """Gradients inside a node do not cross the link, by the log and by the kernel."""
    overrides, rows = [*small, *WIDENED], {}
    for ranks in (1, 2):
        own = [*overrides, f"ranks_per_worker={ranks}"]
        rows[ranks], _ = count(2, own, tmp_path, ["sharded"], ranks=ranks)
    assert [len(of_node) for of_node in rows.values()] == [2, 2]
    logs = [sum(row["log_bytes"] for row in of_node) for of_node in rows.values()]
    assert logs[0] == logs[1] > 2e6
    for row in rows[2]:
        assert row["log_bytes"] < row["kernel_bytes"] < 1.03 * row["log_bytes"], row


FAILS = f"""
import os, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
print(rank, os.environ["WORD"], flush=True)
(folder / f"rank{{rank}}").touch()
while len([*folder.glob("rank*")]) < 4:
    time.sleep(0.01)
if rank == "3":
    raise SystemExit("no")
time.sleep({PATIENCE})
"""


def test_ranks_follow_the_nodes_and_a_failing_one_ends_the_job(tmp_path, nothing_left):
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    with Network(2) as network:
        with pytest.raises(JobError, match=r"fails.py failed with status 1 on node 1\n") as caught:
            own = {"ranks_per_node": 2, "environment": {"WORD": "word"}, "timeout": PATIENCE}
            network.torchrun(script, tmp_path, **own)
        assert not processes(str(script))
    assert caught.value.status == 1
    said = str(caught.value).splitlines()
    assert {"no", "2 word", "3 word"} < set(said) and "0 word" not in said


def test_time_over(tmp_path, nothing_left):
    script = tmp_path / "sleeps.py"
    script.write_text(SLEEP)
    with Network(2) as network, pytest.raises(JobError, match=r"did not end in 1 s on node 0, 1"):
        network.torchrun(script, timeout=1)


def test_signals_to_two_commands_at_once(tmp_path, nothing_left):
    script = tmp_path / "sleeps.py"
    script.write_text(SLEEP)
    numbers = (signal.SIGTERM, signal.SIGINT)
    commands = []
    for number in numbers:
        shown, errors = (tmp_path / f"{number}.{name}" for name in ("out", "err"))
        with shown.open("w") as out, errors.open("w") as err:
            command = [sys.executable, SCRIPTS / "netns.py", "--nodes=1", script]
            commands.append((subprocess.Popen(command, stdout=out, stderr=err), shown, errors))
    for (command, shown, errors), number in zip(commands, numbers, strict=True):
        wait_until(lambda shown=shown: shown.read_text() == "ready 0\n")  # node 0's output
        assert len(namespaces(command.pid)) == 2
        os.kill(command.pid, number)
        assert command.wait(PATIENCE) == 128 + number
        assert not namespaces(command.pid)
        assert "Traceback" not in errors.read_text()


def test_an_exception_in_the_block(tmp_path, nothing_left):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Network(3) as network:
        left = in_node(network, 2, SLEEP, tmp_path)
        assert left.stdout.readline() == "ready None\n"
        assert set(network.names) < set(namespaces(os.getpid()))
        assert f" mtu {MTU} " in in_node(network, 2, SHOW_LINK).communicate()[0]
        raise ZeroDivisionError
    assert left.wait(PATIENCE) == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_network_that_cannot_be_built(nothing_left):
    with pytest.raises(RuntimeError, match="burst"), Network(2, rate="0bit"):
        pass


def test_rate(nothing_left):
    """No upper bound: the machine may be busy. What a burst lets through at once is free."""
    size, rate, burst = 3_000_000, 40e6, 4 * (MTU + ETHERNET_HEADER)
    with Network(2, rate="40mbit") as network:
        assert seconds_to_send(network, size) >= (size - burst) * 8 / rate


def test_a_process_that_does_not_end_is_named(tmp_path, monkeypatch, nothing_left):
    """And the network is removed."""
    monkeypatch.setattr("scripts.netns.SECONDS_TO_END", 0)
    with (
        monkeypatch.context() as patch,
        pytest.raises(RuntimeError, match="killed processes have not ended in 0 s: ") as caught,
        Network(1) as network,
    ):
        left = in_node(network, 0, SLEEP, tmp_path)
        assert left.stdout.readline() == "ready None\n"
        patch.setattr("os.kill", lambda *_: None)
    left.kill()
    left.wait(PATIENCE)
    assert str(caught.value).endswith(f": {left.pid}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes=0", "SCRIPT"], "nodes=0 is not allowed: give a whole number from 1 to 100"),
        (["--nodes=2", "--rate=fast", "SCRIPT"], "rate=fast is not allowed: give bits per second"),
        (["--nodes=2", "--delay=1", "SCRIPT"], "delay=1 is not allowed: give a time, as in 1ms"),
        (["--nodes=2", "nowhere.py"], "nowhere.py is not a file: give a Python script"),
    ],
)
def test_errors_are_one_line(arguments, message, nothing_left):
    arguments = [__file__ if argument == "SCRIPT" else argument for argument in arguments]
    result = subprocess.run(
        [sys.executable, SCRIPTS / "netns.py", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_counting_needs_nodes():
    with pytest.raises(RunError, match=r"several nodes are needed: start with scripts/netns.py"):
        check_launch(1, 3, Workers(alone=True))


@pytest.mark.parametrize(
    ("function", "value", "message"),
    [
        ("sys.platform", "darwin", "this is darwin, network namespaces need Linux"),
        ("os.geteuid", lambda: 1000, "network namespaces need root: start this as root"),
        ("shutil.which", lambda name: None, "the command ip is missing: install iproute2"),
    ],
)
def test_missing_requirements(function, value, message, monkeypatch):
    monkeypatch.setattr(function, value)
    assert requirements_missing() == message
