"""`make ablation`: what the start of the head, the sampler and the reward are worth.

Real data sets made on the spot, five seeds. A seed is a new split by building, with its own
bands, and new draws; all variants of a seed share them, so differences are paired. Every variant
gets the same epochs and, for the starts, the better of two learning rates on validation data.
The numbers are those of the epoch that is best on validation data, on test data.

Writes docs/ablation.md from build/ablation/results.jsonl, where finished runs are kept: a second
call goes on. `--report` only rewrites the page.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tests.benchmarks.code_set import write_code
from tests.benchmarks.patch_set import write_patches
from tripletkit import config as configuration
from tripletkit import fsio, inputs
from tripletkit.data.bands import build_bands
from tripletkit.data.split import split_parquet
from tripletkit.data.store import open_store
from tripletkit.demo_data import write_fonts
from tripletkit.paths import run_paths
from tripletkit.train import checkpoint as checkpoints
from tripletkit.train import loop
from tripletkit.train.evaluation import Evaluation
from tripletkit.train.head import Head, load_weights

REPOSITORY = Path(__file__).parent.parent.parent
WORK = REPOSITORY / "build/ablation"
RESULTS = WORK / "results.jsonl"

SEEDS = range(5)
COMMON = {
    "num_epochs": 6,
    "learning_rate": 1e-3,
    "monitor": "map@r",
    "retrieval_metric_top_k": [1, 10],
    "device": "cpu",
    "negative_sampler": "uniform",
}
BASELINE = "uniform"

STARTS = {
    f"{init}, learning rate {rate:g}": {"init": init, "learning_rate": rate}
    for init in ("lda", "pca", "random")
    for rate in (3e-4, 1e-3)
}
SAMPLERS: dict[str, dict[str, object]] = {
    "uniform": {},
    "random": {"negative_sampler": "random"},
    "hardest band": {"negative_sampler": "fixed:0"},
    **{
        f"ucb {reward}, discount {discount:g}": {
            "negative_sampler": "ucb",
            "ucb_reward": reward,
            "ucb_discount": discount,
        }
        for reward in ("useful_rate", "violation_rate", "loss", "negative_loss")
        for discount in (1.0, 0.9)
    },
}
VARIANTS = {**SAMPLERS, **STARTS}


class Case(NamedTuple):
    """A data set and what is asked of it."""

    write: Callable[[Path], Path]
    fractions: dict[str, float]
    output_dim: int
    variants: dict[str, dict[str, object]]


ALL = {"train": 0.7, "val": 0.1, "test": 0.2}
# A part stays unused: two hundred runs should not take a day.
HALF = {"train": 0.35, "val": 0.1, "test": 0.2, "rest": 0.35}
CASES = {
    "patches": Case(write_patches, ALL, 128, VARIANTS),
    "fonts": Case(partial(write_fonts, seed=42), HALF, 128, VARIANTS),
    # Nothing in its training modules helps with others, so it has no say on samplers.
    "code": Case(write_code, HALF, 512, STARTS),
}


def prepare(data: str, seed: int) -> Path:
    """The folder with the data split by `seed` and its bands; built by whoever comes first."""
    folder = WORK / f"{data}-{seed}"
    bands = folder / "bands.parquet"
    with fsio.exclusive_lock(WORK / f"{data}-{seed}.lock"):
        if not bands.exists():
            shutil.rmtree(folder, ignore_errors=True)
            fractions = CASES[data].fractions
            split_parquet(WORK / f"{data}.parquet", folder, fractions=fractions, seed=seed)
            build_bands(open_store(folder / "train.parquet", folder / "cache"), bands)
    return folder


def run(data: str, seed: int, variant: str) -> dict[str, object]:
    """Train one variant; its result on test data."""
    folder = prepare(data, seed)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        paths = run_paths(Path(place))
        config = configuration.with_values(
            configuration.Config(),
            global_={"seed": seed, "scratch_dir": folder},
            paths={
                "train_parquet_path": folder / "train.parquet",
                "val_parquet_path": folder / "val.parquet",
                "difficulty_metadata_path": folder / "bands.parquet",
                "checkpoint_dir": place,
            },
            training_model={"output_dim": CASES[data].output_dim},
            training={**COMMON, **VARIANTS[variant]},
        )
        result = loop.train(config, inputs.training_data(config), paths)
        best = checkpoints.load(paths.best)
        last = json.loads(paths.metrics.read_text().splitlines()[-1])
    test = open_store(folder / "test.parquet", folder / "cache")
    head = Head(config.training_model, test.embeddings.shape[1])
    load_weights(head, best["model_state_dict"], paths.best)
    evaluation = Evaluation(
        test, None, config.training,
        seed=0, device=torch.device("cpu"), precision=torch.float32,
    )  # fmt: skip
    return {
        "data": data, "seed": seed, "variant": variant,
        "val": result.best_metrics["map@r"], "best_epoch": result.best_epoch,
        "test": evaluation.of(head), "raw": evaluation.raw(),
        "shares": last["bands"]["share"],
    }  # fmt: skip


def results() -> list[dict[str, object]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def run_all(workers: int) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    done = {(r["data"], r["seed"], r["variant"]) for r in results()}
    wanted = [(d, s, v) for d, case in CASES.items() for s in SEEDS for v in case.variants]
    missing = [job for job in wanted if job not in done]
    for data, case in CASES.items():
        if not (WORK / f"{data}.parquet").exists():
            case.write(WORK)
    with (
        ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        RESULTS.open("a") as file,
    ):
        futures = [pool.submit(run, *job) for job in missing]
        for number, future in enumerate(as_completed(futures), 1):
            line = future.result()
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"{number}/{len(missing)} {line['data']} {line['variant']}", flush=True)


# --- the page --------------------------------------------------------------------------------

# Two-sided 95 % quantiles of Student's t with n - 1 degrees of freedom.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def interval(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} ± {half:.4f}"


def table(data: str, names: list[str], baseline: str) -> Iterator[str]:
    by_variant: dict[str, dict[int, dict]] = defaultdict(dict)  # type: ignore[type-arg]
    for r in results():
        if r["data"] == data:
            by_variant[r["variant"]][r["seed"]] = r  # type: ignore[index]
    yield f"| {data} | recall@1 | MAP@R | MAP@R minus {baseline}, paired | best epoch |"
    yield "|---|---|---|---|---|"
    first = by_variant[baseline]
    raw = [r["raw"] for r in first.values()]
    yield (
        f"| raw embeddings | {interval([r['recall@1'] for r in raw])} "
        f"| {interval([r['map@r'] for r in raw])} | | |"
    )
    for name in names:
        runs = by_variant[name]
        difference = [
            runs[s]["test"]["map@r"] - first[s]["test"]["map@r"] for s in runs if s in first
        ]
        yield (
            f"| {name} | {interval([r['test']['recall@1'] for r in runs.values()])} "
            f"| {interval([r['test']['map@r'] for r in runs.values()])} "
            f"| {'' if name == baseline else interval(difference)} "
            f"| {statistics.fmean(r['best_epoch'] for r in runs.values()):.1f} |"
        )


def best_rate(data: str, init: str) -> str:
    """The learning rate of a start that is best on validation data, averaged over seeds."""
    scores: dict[str, list[float]] = defaultdict(list)
    for r in results():
        if r["data"] == data and str(r["variant"]).startswith(f"{init}, "):
            scores[str(r["variant"])].append(r["val"])  # type: ignore[arg-type]
    return max(scores, key=lambda name: statistics.fmean(scores[name]))


def tables() -> str:
    lines = []
    for data in CASES:
        starts = [best_rate(data, init) for init in ("lda", "pca", "random")]
        lines += ["", f"### Start of the head, {data}", "", *table(data, starts, starts[0])]
    for data in CASES:
        if not SAMPLERS.keys() <= CASES[data].variants.keys():
            continue
        lines += ["", f"### Sampler and reward, {data}", "", *table(data, list(SAMPLERS), BASELINE)]
    return "\n".join(lines).strip() + "\n"


BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"


def write_page() -> None:
    """Replace the tables of docs/ablation.md; the words around them are written by people."""
    page = REPOSITORY / "docs/ablation.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(before + BEGIN + "\n" + tables() + "\n" + END + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="only rewrite the page")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    if not arguments.report:
        run_all(arguments.workers)
    write_page()


if __name__ == "__main__":
    main()
