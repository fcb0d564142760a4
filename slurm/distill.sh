#!/bin/bash
# The training job without submitit:
#
#   sbatch slurm/distill.sh --config configs/distil.yaml --teacher runs/teacher --student all
#
# What follows the script's name goes to `python -m mvat_dist.train`; what comes before it goes to sbatch
# and overrides the lines below, which are defaults:
#
#   sbatch --nodes 8 --gpus-per-node 4 --ntasks-per-node 4 --partition gpu slurm/distill.sh --student all
#
# The trainer reads nodes, tasks, addresses and ports from Slurm. Paths are relative to where sbatch was
# called. `mvat-distill-JOB.log` there tells how the job went, runs/slurm/JOB-RANK.log what each rank says.
# At its time limit or when preempted the trainer saves, and the job is queued again: at most
# MVAT_MAX_RESTARTS times (default 1000; `sbatch --export ALL,MVAT_MAX_RESTARTS=0` for never). With another
# --signal than below say so, for the warning where it comes too late: MVAT_SIGNAL_LEAD=300.

#SBATCH --job-name=mvat-distill
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=3
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mvat-distill-%j.log

set -uo pipefail

# Slurm writes 1(x4) for a task on each of four nodes.
tasks=${SLURM_TASKS_PER_NODE:-1}
tasks=${tasks%%[^0-9]*}
gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus > tasks)); then
    echo "error: $gpus GPUs on a node for $tasks task(s) of one GPU each: add --ntasks-per-node $gpus to sbatch" >&2
    exit 2
fi

# Slurm runs a copy of this script, from its spool folder; environment.sh lies beside the original.
from=${SLURM_SUBMIT_DIR:-$PWD}
original=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null |
    sed -n 's|^ *Command=\(/.*\)/distill\.sh.*|\1|p')
for folder in "$(dirname "${BASH_SOURCE[0]}")" "${original:-$from}" "$from/slurm" "$from"; do
    [[ -f $folder/environment.sh ]] && break
done
if [[ ! -f $folder/environment.sh ]]; then
    echo "error: no slurm/environment.sh in $from: call sbatch from the project's folder" >&2
    exit 2
fi
# shellcheck source=slurm/environment.sh
source "$folder/environment.sh" || exit

logs=runs/slurm
mkdir -p "$logs" || exit 2
log=$logs/${SLURM_JOB_ID:-0}
printf '%s job %s, start %s: %s tasks on %s\n' "$(date '+%F %T')" "${SLURM_JOB_ID:-none}" \
    "$((${SLURM_RESTART_COUNT:-0} + 1))" "${SLURM_NTASKS:-?}" "${SLURM_JOB_NODELIST:-?}"
printf 'follow: tail -F %q\n' "$PWD/$log-0.log"

srun --export=ALL --unbuffered --open-mode=append --output="$log-%t.log" \
    python -m mvat_dist.train "$@"
code=$?
if ((code)); then
    printf '%s ended with exit code %s; the end of %s-0.log:\n' "$(date '+%F %T')" "$code" "$log"
    tail -n 15 "$log-0.log"
    # A killed rank cannot have the job queued again, nor say how it ended.
    python -m mvat_dist.launch.requeue "$code" "$@"
fi
exit "$code"
