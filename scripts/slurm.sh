#!/bin/bash
# Train on several nodes under SLURM, one process per GPU (or NPROC processes per node without GPUs):
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 scripts/slurm.sh experiment=paper \
#       ranks_per_worker=8
#
# All processes of a node are one task of SLURM's: --cpus-per-task is the number of cores of a node.
# Arguments are Hydra overrides. The run directory lies in the folder that sbatch was called from,
# on a file system that all nodes share. A node that fails is waited for, and the run resumes from
# its newest checkpoint; so does a job that is requeued, when it is preempted. SLURM asks it to stop
# 120 s before it ends; for the step at hand and a checkpoint torchrun gives it 110 s of these.
#SBATCH --job-name=ef21-muon
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.log

set -euo pipefail
processes=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node have ports of their own
job=(train.py directory="runs/slurm-$SLURM_JOB_ID" resume=auto "$@")

.venv/bin/python "${job[@]}" --cfg > /dev/null # a wrong configuration ends here, and is not restarted

# srun does not take over sbatch's --cpus-per-task.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" .venv/bin/torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="$processes" \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$first:$port" \
    --max-restarts=3 \
    --shutdown-timeout=110 \
    "${job[@]}"
