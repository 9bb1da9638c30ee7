"""`tripletkit demo`: the whole job on real data that every machine with matplotlib has."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from tripletkit import config as configuration
from tripletkit import demo_data, fsio, inputs, log, stages, submission
from tripletkit.cluster import preempt
from tripletkit.config import Config
from tripletkit.errors import DONE
from tripletkit.paths import run_paths

SEED = 42
FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}


def run(folder: Path) -> int:
    """Render characters, split them, build bands, train, tune, evaluate on unseen ones, report.

    What an earlier call left in `folder` is used again.
    """
    from tripletkit.tune.best import final_config

    started = time.monotonic()
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    parquet = {name: folder / f"{name}.parquet" for name in FRACTIONS}
    metadata = folder / "difficulty_metadata.parquet"

    if not all(path.exists() for path in parquet.values()):
        _step("1/8 render characters in the fonts that matplotlib ships: a character is a building")
        fonts = demo_data.write_fonts(folder, seed=SEED)
        stages.split_data(fonts, folder, fractions=FRACTIONS, seed=SEED)

    config_file = folder / "config.toml"
    if not config_file.exists():
        values: dict[str, dict[str, object]] = {
            "global": {"seed": SEED, "log_dir": folder / "logs", "scratch_dir": folder},
            "paths": {
                **{f"{name}_parquet_path": path for name, path in parquet.items()},
                "difficulty_metadata_path": metadata,
            },
            "training_model": {"output_dim": 128},
            "training": {
                "num_epochs": 8,
                "learning_rate": 3e-4,
                "monitor": "map@r",
                "retrieval_metric_top_k": [1, 5, 10],
                "early_stopping_patience": 4,
            },
            "tuning": {
                "study_name": "fonts",
                "storage_path": folder / "study.db",
                "n_trials": 6,
                "max_epochs": 3,
                "objective": "map@r",
            },
        }
        fsio.write_text(config_file, configuration.template(values))
    config = configuration.load(config_file, environ={})

    _step("2/8 tripletkit data check")
    stages.check_data(config)
    _step("3/8 tripletkit data bands")
    if not metadata.exists():
        stages.build_bands(config, neighbors=150, k0=50, force=False)
    _step("4/8 tripletkit train")
    with preempt.watch() as stop:
        stages.train(config, stop)
    _step("5/8 tripletkit tune --cluster here: six short trials on a third of the characters")
    sample = configuration.with_values(config, training={"sample_fraction": 0.33})
    submission.tune(sample, "here", prepare=False, dry_run=False)
    _step("6/8 tripletkit submit-best --cluster here: the best trial's parameters, all characters")
    best = submission.find_best(config, "study", None)
    submission.submit_best(config, best, "here", prepare=False, dry_run=False)
    _step("7/8 tripletkit evaluate: characters that training never saw")
    tuned = final_config(config, best)
    heads = [inputs.best_checkpoint(each) for each in (config, tuned)]
    kept = run_paths(tuned.checkpoint_dir).evaluation("test").root
    stages.evaluate(
        tuned, split="test", checkpoint=[str(path) for path in heads], output=str(kept), top=5
    )
    _picture(tuned, folder / "neighbors.png")
    _step("8/8 tripletkit report: of the final training, and of the study")
    pages = {kind: stages.report_path(tuned, kind) for kind in ("run", "study")}
    for kind, page in pages.items():
        stages.report(tuned, of=kind, split="test", output=str(page), figures=None)
    log.out.print(
        f"\n{time.monotonic() - started:.0f} s; everything is in {folder}", soft_wrap=True
    )
    log.out.print(
        f"try: tripletkit status --config {shlex.quote(str(config_file))}", soft_wrap=True
    )
    log.out.print(f"open in a browser: {' and '.join(map(str, pages.values()))}", soft_wrap=True)
    return DONE


def _picture(config: Config, path: Path) -> None:
    import torch

    from tripletkit.demo_picture import draw_neighbors
    from tripletkit.device import as_tensor
    from tripletkit.train.evaluation import project

    store, head, _ = inputs.open_head(config, "test", run_paths(config.checkpoint_dir).best)
    table = as_tensor(store.embeddings)
    projected = project(head, table, torch.arange(len(table)), torch.float32)
    draw_neighbors(path, store, projected, seed=SEED)
    log.out.print(f"nearest characters before and after: {path}", soft_wrap=True)


def _step(title: str) -> None:
    log.out.print(f"\n{title}", style="bold", soft_wrap=True)
