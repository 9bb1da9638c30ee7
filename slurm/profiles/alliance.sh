# shellcheck shell=bash
# The clusters of the Digital Research Alliance of Canada. Before the first use, on a login node:
# alliance_venv.sh builds the virtual environment $TRIPLETKIT_VENV and packs it.
#
# A job unpacks it on the disk of its node, since thousands of small files are slow on a shared one,
# and copies the folder $TRIPLETKIT_DATA, if set, to $SLURM_TMPDIR/data: a configuration may say
# cache_dir = "$SLURM_TMPDIR/data/cache".
export TRIPLETKIT_VENV=${TRIPLETKIT_VENV:-$HOME/tripletkit-venv}

# Before the virtual environment, else it does not see the module's pyarrow.
# shellcheck disable=SC2086 # several words
module load ${TRIPLETKIT_MODULES:-StdEnv/2023 gcc arrow python/3.11 cuda postgresql}

if [ -z "${SLURM_TMPDIR:-}" ]; then # a login node
    # shellcheck source=/dev/null
    . "$TRIPLETKIT_VENV/bin/activate"
else
    # `activate` and the scripts beside it name the folder where they were built; python does not.
    export VIRTUAL_ENV=$SLURM_TMPDIR/venv
    mkdir -p "$VIRTUAL_ENV"
    tar -xf "$TRIPLETKIT_VENV.tar" -C "$VIRTUAL_ENV"
    export PATH="$VIRTUAL_ENV/bin:$PATH"

    if [ -n "${TRIPLETKIT_DATA:-}" ]; then
        mkdir -p "$SLURM_TMPDIR/data"
        cp -rL "$TRIPLETKIT_DATA/." "$SLURM_TMPDIR/data"
        (cd "$SLURM_TMPDIR/data" && sha256sum --check --quiet SHA256SUMS)
    fi
fi
