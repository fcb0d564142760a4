# Finds the project and sets up the ranks of a job: distill.sh and sweep_agent.sh source it.
# shellcheck shell=bash

project=$(cd -- "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd) || return 2
if [[ ! -f $project/mvat_dist/train.py ]]; then
    echo "error: no mvat_dist/train.py in $project, where ${BASH_SOURCE[0]} lies" >&2
    return 2
fi
if [[ -f $project/.venv/bin/activate ]]; then
    # shellcheck disable=SC1091 # made by `make setup`
    source "$project/.venv/bin/activate"
fi
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}

# Rank variables that another launcher left in the shell that called sbatch.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
# Since Slurm 22.05 srun does not take over sbatch's --cpus-per-task.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# Two of a task's CPUs are for its reader processes (--data.workers).
threads=$((SRUN_CPUS_PER_TASK > 3 ? SRUN_CPUS_PER_TASK - 2 : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
# Once a rank has ended, the others get this many seconds to end as well. Not --kill-on-bad-exit: the code of
# a killed rank would hide that of the failed one, which is 2 for a mistake that the user can mend.
export SLURM_WAIT=${SLURM_WAIT:-180} SLURM_KILL_BAD_EXIT=${SLURM_KILL_BAD_EXIT:-0}
export MVAT_MAX_RESTARTS=${MVAT_MAX_RESTARTS:-1000} MVAT_SIGNAL_LEAD=${MVAT_SIGNAL_LEAD:-120}
ulimit -c 0
