#!/usr/bin/env bash
# Search hyperparameters: prepare the study, then submit its workers as one array, and behind it a
# small job that leaves no trial in the hands of a dead worker. Again, it goes on with the study.
#
#   slurm/submit_optuna_tuning.sh --config config.toml --account def-lab --study-name fonts \
#       --storage-path db --num-workers 16 --trials-per-worker 4 --max-concurrent 8
#
# Flags: those of `tripletkit tune` (--help shows them), and --profile NAME (slurm/profiles).
set -euo pipefail
# shellcheck source=slurm/submit.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/submit.sh" tune "$@"

workers=$(submit tune tune.sbatch)
if [ -n "$dry_run" ]; then
    echo "$workers"
    exit
fi
tidy=$(submit tidy tidy.sbatch --dependency="afterany:$workers")
echo "workers: job array $workers; after them: job $tidy"
echo "configuration: $config"
