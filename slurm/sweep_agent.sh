#!/bin/bash
# One trial of a sweep on all nodes of a job; as an array, many trials:
#
#   wandb sweep configs/sweep.yaml                                      # prints ENTITY/PROJECT/ID
#   sbatch --array 0-19 slurm/sweep_agent.sh ENTITY/PROJECT/ID
#   sbatch --array 0-19 slurm/sweep_agent.sh configs/sweep.yaml         # without a server: task i, point i
#
# What comes before the script's name goes to sbatch and overrides the lines below, which are defaults. In
# each job one W&B agent runs, in this shell; the trial that it starts calls srun once, for a rank in every
# task. A job that comes back after a preemption, its time limit or a killed rank goes on with its own trial.
# `mvat-sweep-ARRAY_TASK.log` tells how it went, runs/sweep-ID/slurm/JOB-RANK.log what each rank says.

#SBATCH --job-name=mvat-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=3
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mvat-sweep-%A_%a.log

set -uo pipefail

if (($# < 1)); then
    echo "error: give ENTITY/PROJECT/ID as wandb sweep prints it, or a sweep file" >&2
    exit 2
fi

# Slurm runs a copy of this script, from its spool folder; environment.sh lies beside the original.
from=${SLURM_SUBMIT_DIR:-$PWD}
original=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null |
    sed -n 's|^ *Command=\(/.*\)/sweep_agent\.sh.*|\1|p')
for folder in "$(dirname "${BASH_SOURCE[0]}")" "${original:-$from}" "$from/slurm" "$from"; do
    [[ -f $folder/environment.sh ]] && break
done
if [[ ! -f $folder/environment.sh ]]; then
    echo "error: no slurm/environment.sh in $from: call sbatch from the project's folder" >&2
    exit 2
fi
# shellcheck source=slurm/environment.sh
source "$folder/environment.sh" || exit

printf '%s job %s, start %s: a trial of %s on %s\n' "$(date '+%F %T')" "${SLURM_JOB_ID:-none}" \
    "$((${SLURM_RESTART_COUNT:-0} + 1))" "$1" "${SLURM_JOB_NODELIST:-?}"
if [[ -f $1 ]]; then
    if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
        echo "error: a sweep file needs an array, a task for each point: sbatch --array 0-19 ..." >&2
        exit 2
    fi
    exec python -m mvat_dist.sweep "$@" --point "$SLURM_ARRAY_TASK_ID"
fi
exec python -m mvat_dist.launch.sweep_jobs "$@"
