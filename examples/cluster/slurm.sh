#!/bin/bash
# A recipe on several nodes of a SLURM cluster; not yet run on a cluster.
#
#   sbatch --nodes=2 examples/cluster/slurm.sh deit_base --data /shared/imagenet --out /shared/runs/deit_base
#
# --data and --out lie on a file system that every node sees. 120 seconds before its time is over, and when it is
# preempted, the job saves, ends with exit code 75 and goes back into the queue, where the same command resumes.
# Every other exit code ends it; docs/reliability.md says what they mean.

#SBATCH --job-name=deitfast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u

master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node meet at ports of their own

# One launcher a node. Those that end first leave the others the time to finish their save. Without --wait a node whose
# launcher is gone would keep the rest until the job's time is over.
srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    deitfast train "$@" --nodes "$SLURM_JOB_NUM_NODES" --master "$master:$port" --restarts 3
code=$? # the highest of the nodes'

if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
