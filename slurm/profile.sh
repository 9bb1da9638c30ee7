# shellcheck shell=bash
# Loads profiles/$TRIPLETKIT_PROFILE.sh, which puts a python that has tripletkit on PATH.
profile=$(dirname "${BASH_SOURCE[0]}")/profiles/${TRIPLETKIT_PROFILE:-generic}.sh
if [ ! -r "$profile" ]; then
    echo "error: there is no $profile" >&2
    echo "hint: TRIPLETKIT_PROFILE and --profile take the name of a file in slurm/profiles" >&2
    exit 2
fi
set +u # modules and virtual environments read variables that are not set
# shellcheck source=slurm/profiles/generic.sh
. "$profile"
set -u
if ! python -c 'import tripletkit' 2>/dev/null; then
    echo "error: no python with tripletkit after $profile" >&2
    echo "hint: set TRIPLETKIT_VENV to a virtual environment that has it" >&2
    exit 2
fi
