# shellcheck shell=bash
# Any cluster: the virtual environment $TRIPLETKIT_VENV; without it, the python on PATH, which a job
# inherits from the shell that submits it.
if [ -n "${TRIPLETKIT_VENV:-}" ]; then
    # shellcheck source=/dev/null
    . "$TRIPLETKIT_VENV/bin/activate"
fi
