"""scripts/slurm.sh, with stand-ins for what SLURM has and for the programs that it starts."""

import os
import re
import subprocess

import pytest
from run import ROOT
from torch.distributed.run import get_args_parser

SCRIPT = ROOT / "scripts" / "slurm.sh"
JOB = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
JOB |= {"SLURM_CPUS_ON_NODE": "48", "SLURM_GPUS_ON_NODE": "8"}
STAND_INS = {
    "bin/scontrol": "echo node1; echo node2",
    "bin/srun": 'printf "%s\\n" "$@"',
    ".venv/bin/python": 'echo "error: $*" >&2; exit "${WRONG:-0}"',
}


def sbatch(folder, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    for name, text in STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    env = JOB | {"PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"} | environment
    command = ["bash", SCRIPT, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("given", "cores"), [({}, "48"), ({"SLURM_CPUS_PER_TASK": "32"}, "32")])
def test_torchrun_takes_what_it_is_given(tmp_path, given, cores):
    result = sbatch(tmp_path, "experiment=paper", "label=a b", **given)
    assert result.returncode == 0, result.stderr
    of_srun, program, *arguments = result.stdout.splitlines()
    assert (of_srun, program) == (f"--cpus-per-task={cores}", ".venv/bin/torchrun")
    options = get_args_parser().parse_args(arguments)
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("2", "8", 3)
    assert options.rdzv_endpoint == "node1:22345" and options.training_script == "train.py"
    assert options.training_script_args == [
        *("directory=runs/slurm-12345", "resume=auto", "experiment=paper", "label=a b")
    ]
    grace = int(re.search(r"^#SBATCH --signal=TERM@(\d+)$", SCRIPT.read_text(), re.MULTILINE)[1])
    assert 90 <= options.shutdown_timeout < grace


def test_a_wrong_configuration_is_not_started(tmp_path):
    result = sbatch(tmp_path, "steeps=1", WRONG="78")
    assert result.returncode == 78 and result.stdout == ""
    message = "error: train.py directory=runs/slurm-12345 resume=auto steeps=1 --cfg\n"
    assert result.stderr == message
