# shellcheck shell=bash
# What the submit_*.sh wrappers have in common. `. submit.sh COMMAND FLAG ...` prepares the jobs of
# `tripletkit COMMAND FLAG ...`; $config is then their configuration, and `submit` submits them.
set -euo pipefail

TRIPLETKIT_SLURM_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) # jobs run a copy of their script
export TRIPLETKIT_SLURM_DIR TRIPLETKIT_PROFILE=${TRIPLETKIT_PROFILE:-generic}

command=$1
shift
flags=()
dry_run=''
while [ $# -gt 0 ]; do
    case $1 in
        --profile) TRIPLETKIT_PROFILE=${2:?--profile needs a name} && shift ;;
        --profile=*) TRIPLETKIT_PROFILE=${1#*=} ;;
        --dry-run) dry_run=yes ;;
        *) flags+=("$1") ;;
    esac
    shift
done

if [ -n "${SLURM_JOB_ID:-}" ]; then # we run in a job: what it says of itself is not for ours
    for name in "${!SLURM_@}"; do
        [ "$name" = SLURM_CONF ] || unset "$name"
    done
fi

# shellcheck source=slurm/profile.sh
. "$TRIPLETKIT_SLURM_DIR/profile.sh"

answer=$(python -m tripletkit "$command" --cluster slurm --prepare ${dry_run:+--dry-run} ${flags[@]+"${flags[@]}"})
unset TRIPLETKIT_WEBHOOK # jobs find it in a file; some sites keep the environment of jobs
config=${answer%%$'\n'*} # what the options are read from
if [ ! -f "$config" ]; then # the answer to --help
    printf '%s\n' "$answer"
    exit
fi
jobs_config=${answer##*$'\n'} # what the jobs read; a dry run leaves none

# submit STAGE FILE [OPTION ...]: submit an sbatch file; prints the id of its job.
submit() {
    local stage=$1 file=$TRIPLETKIT_SLURM_DIR/$2 options id
    shift 2
    mapfile -d '' -t options < <(python "$TRIPLETKIT_SLURM_DIR/sbatch_options.py" "$stage" "$config")
    wait "$!" || exit
    set -- sbatch --parsable --export=ALL "${options[@]}" "$@" "$file" "$jobs_config"
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@" && echo
        return
    fi
    id=$("$@") || exit 4
    echo "${id%%;*}" # without the name of the cluster
}
