#!/bin/bash
# One search by an array of Slurm jobs: every task is a worker, all share one PostgreSQL database.
#
#   export HF_ELASTIC_STORAGE=postgresql://me@dbhost/searches
#   sbatch --array=0-99 examples/slurm_search.sh small.run --within macs=0.6 --evaluations 2000
#
# All arguments go to `hf-elastic worker`; they have to be the same for all tasks. small.run is what `hf-elastic compress
# MODEL --recipe best --output small` leaves, on a file system that all nodes see; module:function does as well.
# A password belongs into ~/.pgpass (mode 600), not into the URL: command lines are visible to everyone on a node.
#
# Add tasks at any time with a second sbatch of the same command. A preempted or timed-out task hands its evaluation back
# and is put into the queue again, one that was cancelled (scancel) hands it back and stays away; a killed one loses its
# evaluation, which another takes over when its lease is over.

#SBATCH --job-name=hf-elastic-worker
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# To the shell below (B:), two minutes before the time is over. Preemption and scancel send SIGTERM by themselves, which
# is why this is another signal: Slurm queues what it preempts by itself, what the user cancels shall not come back.
#SBATCH --signal=B:USR1@120

set -u
: "${HF_ELASTIC_STORAGE:?set HF_ELASTIC_STORAGE to the URL of the database}"
[ $# -ge 1 ] || { echo "usage: sbatch --array=0-99 $0 RUN_OR_MODULE:FUNCTION [worker options]" >&2; exit 2; }

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# The shell gets the signal and passes it on. It ends `wait` early, so that only a `wait` without one tells how it went.
"${HF_ELASTIC:-hf-elastic}" worker "$@" --storage "$HF_ELASTIC_STORAGE" --lease "${HF_ELASTIC_LEASE:-600}" &
worker=$!
trap 'signalled=yes; kill -TERM "$worker" 2>/dev/null' TERM INT
trap 'signalled=yes; out_of_time=yes; kill -TERM "$worker" 2>/dev/null' USR1
signalled=yes out_of_time=
while [ -n "$signalled" ]; do
    signalled=
    wait "$worker"
    code=$?
done

# 143: handed back on SIGTERM.
if [ "$code" -eq 143 ] && [ -n "$out_of_time" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    exec scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
