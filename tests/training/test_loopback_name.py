"""Machines whose own names are 127.0.1.1, as Debian has it, in a network of namespaces."""

import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
from bad_inputs import free_port
from run import PATIENCE, ROOT

from scripts.fleet import worker_overrides
from scripts.netns import Network
from training.workers import FINAL

IN_NODE = 'mount --bind "$1" /etc/hosts; hostname "$2"; shift 2; exec ip netns exec "$@"'
REFUSED = "would listen at 127.0.1.1, which is no address for other machines: give the one by which"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a Python process on a node, with variables of its own."""
    if os.geteuid():
        pytest.skip("needs root, to make namespaces")
    hosts = tmp_path_factory.mktemp("hosts")
    with Network(2) as network, ExitStack() as processes:

        def start(node, *command, **variables):
            text = f"127.0.0.1 localhost\n127.0.1.1 node{node}\n"
            others = (f"{one} node{n}\n" for n, one in enumerate(network.addresses) if n != node)
            (hosts / str(node)).write_text(text + "".join(others))
            own = [hosts / str(node), f"node{node}", network.names[node], sys.executable]
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
            process = subprocess.Popen(
                ["unshare", "--mount", "--uts", "sh", "-c", IN_NODE, "sh", *own, *command],
                cwd=ROOT,
                env=env,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            processes.callback(process.kill)
            return process

        start.addresses = network.addresses
        yield start


def ends(processes) -> list[tuple[int, str]]:
    """Of every process the status, and what it says of errors."""
    ends = []
    for process in processes:
        _, text = process.communicate(timeout=PATIENCE)
        ends.append((process.returncode, text))
    return ends


@pytest.mark.slow
def test_fixed_workers_are_told_of_the_interface_by_which_they_then_train(start, small, tmp_path):
    for variables, status in (({}, FINAL), ({"GLOO_SOCKET_IFNAME": "eth0"}, 0)):
        meet = {"MASTER_ADDR": start.addresses[0], "MASTER_PORT": str(free_port())}
        meet |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        command = ["train.py", *small, f"directory={tmp_path}/run"]
        (first, told), (second, _) = ends(
            [start(rank, *command, RANK=str(rank), **meet, **variables) for rank in range(2)]
        )
        assert first == second == status, told
        if status:
            assert "is on a machine whose name, node" in told and "is 127.0.1.1 there" in told
            assert "set GLOO_SOCKET_IFNAME on every node" in told


@pytest.mark.slow
def test_membership_host_suffices(start, small, tmp_path):
    pytest.importorskip("torchft")
    for by_address, status in ((False, FINAL), (True, 0)):
        port = free_port()
        lighthouse = start(0, "scripts/fleet.py", "lighthouse", "--workers=2", f"--port={port}")
        workers = []
        for number, address in enumerate(start.addresses):
            options = type("Options", (), {"workers": 2, "ranks": 1})
            options.lighthouse = f"http://{start.addresses[0]}:{port}"
            options.overrides = [*small, "optimizer=local", "optimizer.sync_every=2"]
            options.overrides += [f"directory={tmp_path}/{status}"]
            options.overrides += [f"membership.host={address}"] if by_address else []
            workers.append(start(number, "train.py", *worker_overrides(options, number)))
        for number, (found, told) in enumerate(ends(workers)):
            assert found == status, told
            own = (
                f"error: worker {number} cannot continue: worker {number} on node{number} (process"
            )
            assert status == 0 or (own in told and REFUSED in told)
        lighthouse.terminate()


@pytest.mark.slow
def test_a_lighthouse_by_the_name_localhost_is_named_where_a_worker_is_elsewhere(
    start, small, tmp_path
):
    pytest.importorskip("torchft")
    port = free_port()
    lighthouse = start(0, "scripts/fleet.py", "lighthouse", "--workers=2", f"--port={port}")
    workers = []
    for number, host in enumerate(("localhost", start.addresses[0])):
        options = type(
            "Options", (), {"workers": 2, "ranks": 1, "lighthouse": f"http://{host}:{port}"}
        )
        options.overrides = [*small, "optimizer=local", "optimizer.sync_every=2"]
        options.overrides += [f"directory={tmp_path}/local"]
        options.overrides += [f"membership.host={start.addresses[1]}"] if number else []
        workers.append(start(number, "train.py", *worker_overrides(options, number)))
    for number, worker in enumerate(workers):
        line = ""
        while "no round of workers" not in line:
            line = worker.stderr.readline()
            assert line, f"worker {number} has ended"
        assert line.startswith(
            f"worker {number}: no round of workers 0, 1: the workers' store is at local"
        )
        assert "give each its address there, membership.host=ADDRESS (" in line
        worker.terminate()
    lighthouse.terminate()
