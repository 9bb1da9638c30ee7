#!/usr/bin/env bash
# Train with the parameters of the best trial, on all the data, to the end: past the time limit the
# job is started again and goes on.
#
#   slurm/submit_best_training.sh --config config.toml --account def-lab --study-name fonts
#
# Flags: those of `tripletkit submit-best` (--help shows them), and --profile NAME (slurm/profiles).
set -euo pipefail
# shellcheck source=slurm/submit.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/submit.sh" submit-best "$@"

training=$(submit best best_training.sbatch)
if [ -n "$dry_run" ]; then
    echo "$training"
    exit
fi
echo "training: job $training"
echo "configuration: $config"
