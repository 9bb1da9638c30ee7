# shellcheck shell=bash
# What the *.sbatch files have in common: source this file, then `run COMMAND ...`.
#
# Slurm sends its signals to this shell alone (--signal=B:...). So the command runs in the background,
# and signals are passed on to it. A command that ends with 85 has saved its state and asks for
# another start of the job.
set -euo pipefail

signal=''
pid=''

pass_on() {
    signal=$1
    if [ -n "$pid" ]; then
        kill -s "$signal" "$pid" 2>/dev/null || true
    fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

# shellcheck source=slurm/profile.sh
. "$(dirname "${BASH_SOURCE[0]}")/profile.sh"

run() {
    local code=0
    if [ -n "$signal" ]; then # it came while the profile was loaded
        code=$((128 + $(kill -l "$signal")))
    else
        "$@" &
        pid=$!
        while kill -0 "$pid" 2>/dev/null; do
            wait "$pid" || true # a signal ends `wait`, not the command
        done
        wait "$pid" || code=$?
    fi
    # 128 + USR1: the command was not listening yet, so nothing is lost; but it may need more time.
    if [ "$code" -eq 138 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
        code=85
    fi
    if [ "$code" -eq 85 ]; then
        requeue
    fi
    exit "$code"
}

requeue() {
    # An array's element under this name only: its SLURM_JOB_ID may be that of the whole array.
    local job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    local most=${TRIPLETKIT_MAX_RESTARTS:-100} answer
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$most" ]; then
        echo "job $job was started again $most times (TRIPLETKIT_MAX_RESTARTS): not again" >&2
        return
    fi
    until answer=$(scontrol requeue "$job" 2>&1) || [[ $answer == *"pending execution"* ]]; do
        echo "scontrol requeue $job: $answer" >&2
        # Only a controller that is away, for a restart perhaps, is worth another try.
        [[ $answer =~ "Unable to contact"|"timed out" ]] || return 0
        sleep 5 || true
    done
    { sleep 600 || true; } 2>/dev/null # for Slurm to end this start of the job
}
