#!/usr/bin/env bash
# For profiles/alliance.sh: builds the virtual environment $TRIPLETKIT_VENV from the wheelhouse and
# packs it. Run it once on a login node, and again after an update of tripletkit:
#
#   slurm/alliance_venv.sh
#
# A package that the wheelhouse lacks: `pip download --no-deps NAME` on a login node, into a folder
# that TRIPLETKIT_WHEELS names.
set -euo pipefail
repository=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
venv=${TRIPLETKIT_VENV:-$HOME/tripletkit-venv}

# shellcheck disable=SC2086 # several words
module load ${TRIPLETKIT_MODULES:-StdEnv/2023 gcc arrow python/3.11 cuda postgresql}
virtualenv --no-download "$venv"
# shellcheck source=/dev/null
. "$venv/bin/activate"

install=(python -m pip install --no-index ${TRIPLETKIT_WHEELS:+--find-links "$TRIPLETKIT_WHEELS"})
"${install[@]}" --upgrade pip setuptools
# The wheelhouse has psycopg2 itself instead of psycopg2-binary, so pip must not ask for the latter.
python -c '
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["project"]["dependencies"], sep="\n")
' "$repository/pyproject.toml" | sed 's/^psycopg2-binary/psycopg2/' >"$venv/requirements.txt"
"${install[@]}" -r "$venv/requirements.txt"
"${install[@]}" --no-deps --no-build-isolation "$repository"

tar -cf "$venv.tar.part" -C "$venv" .
mv "$venv.tar.part" "$venv.tar"
echo "packed $venv.tar"
