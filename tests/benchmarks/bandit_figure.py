"""docs/images/bandit.svg: what the bandit draws and earns, epoch by epoch, and what it is worth.

    python -m tests.benchmarks.bandit_figure

trains the fonts of the tutorial four times, into build/bandit, and draws from their metrics.jsonl.
Runs that are there already are not repeated: remove the folder for that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tripletkit import config as configuration
from tripletkit import inputs
from tripletkit.data.bands import build_bands
from tripletkit.data.split import split_parquet
from tripletkit.data.store import open_store
from tripletkit.demo_data import write_fonts
from tripletkit.paths import run_paths
from tripletkit.train import loop

REPOSITORY = Path(__file__).parent.parent.parent
WORK = REPOSITORY / "build/bandit"
FIGURE = REPOSITORY / "docs/images/bandit.svg"

UCB, TEXTBOOK, UNIFORM, RANDOM = (
    "default bandit", "useful_rate, no forgetting", "uniform over bands", "random",
)  # fmt: skip
VARIANTS: dict[str, dict[str, object]] = {
    UCB: {"negative_sampler": "ucb"},
    TEXTBOOK: {"negative_sampler": "ucb", "ucb_reward": "useful_rate", "ucb_discount": 1.0},
    UNIFORM: {"negative_sampler": "uniform"},
    RANDOM: {"negative_sampler": "random"},
}
COMMON = {
    "num_epochs": 12, "learning_rate": 3e-4, "monitor": "map@r", "retrieval_metric_top_k": [1],
    "device": "cpu",
}  # fmt: skip


def prepare() -> None:
    """The data, split by building, and its bands; as in the tutorial."""
    if not (WORK / "train.parquet").exists():
        WORK.mkdir(parents=True, exist_ok=True)
        fractions = {"train": 0.8, "val": 0.1, "test": 0.1}
        split_parquet(write_fonts(WORK, seed=42), WORK, fractions=fractions, seed=42)
    if not (WORK / "bands.parquet").exists():
        build_bands(open_store(WORK / "train.parquet", WORK / "cache"), WORK / "bands.parquet")


def run(variant: str) -> list[dict[str, Any]]:
    """Train one variant, or go on with it; its metrics, an entry per epoch from 0."""
    paths = run_paths(WORK / variant.replace(", ", "-").replace(" ", "-"))
    if not paths.final.exists():
        config = configuration.with_values(
            configuration.Config(),
            global_={"scratch_dir": WORK},
            paths={
                "train_parquet_path": WORK / "train.parquet",
                "val_parquet_path": WORK / "val.parquet",
                "difficulty_metadata_path": WORK / "bands.parquet",
                "checkpoint_dir": paths.root,
            },
            training_model={"output_dim": 128},
            training={**COMMON, **VARIANTS[variant]},
        )
        loop.train(config, inputs.training_data(config), paths)
    return [json.loads(line) for line in paths.metrics.read_text().splitlines()]


def draw(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Two panels of shares, one of rewards, one of what comes of it."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "bandit", "font.family": "sans-serif",
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.3, "axes.titlesize": 9, "axes.titlelocation": "left",
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            2, 2, figsize=(7.6, 6.2), facecolor="white", layout="constrained", sharex=True
        )
        by_band(axes[0, 0], runs[UCB], "share", "share of the draws, default bandit")
        title = "share of the draws, useful_rate without forgetting"
        by_band(axes[0, 1], runs[TEXTBOOK], "share", title)
        by_band(axes[1, 0], runs[UCB], "reward", "mean reward, default bandit")
        axes[0, 0].set_ylim(0, 0.2)
        axes[0, 1].set_ylim(0, 1)
        colors = ("#0072b2", "#d55e00", "#009e73", "#555555")  # Okabe and Ito
        for (variant, lines), color in zip(runs.items(), colors, strict=True):
            axes[1, 1].plot(
                [line["epoch"] for line in lines], [line["map@r"] for line in lines],
                label=variant, color=color, linestyle="--" if variant in (UNIFORM, RANDOM) else "-",
            )  # fmt: skip
        axes[1, 1].set_title("MAP@R of validation images")
        axes[1, 1].legend(frameon=False, fontsize=8)
        for each in axes[1]:
            each.set_xlabel("epoch")
        legend = {
            "ncols": 8, "frameon": False, "fontsize": 8, "columnspacing": 1.2, "handlelength": 1.5,
        }  # fmt: skip
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", **legend)
        FIGURE.parent.mkdir(exist_ok=True)
        figure.savefig(FIGURE, format="svg", metadata={"Date": None})
        plt.close(figure)


def by_band(axes: Any, lines: list[dict[str, Any]], what: str, title: str) -> None:
    """A line per band, dark is hard; the random negatives dashed."""
    from matplotlib import colormaps

    lines = [line for line in lines if "bands" in line]
    epochs = [line["epoch"] for line in lines]
    arms = list(zip(*(line["bands"][what] for line in lines), strict=True))
    for number, values in enumerate(arms):
        last = number == len(arms) - 1
        axes.plot(
            epochs, values, linestyle="--" if last else "-",
            color="#555555" if last else colormaps["viridis"](number / (len(arms) - 1)),
            label="random" if last else f"band {number}" if number else "band 0 (hardest)",
        )  # fmt: skip
    axes.set_title(title)


if __name__ == "__main__":
    prepare()
    draw({variant: run(variant) for variant in VARIANTS})
    print(FIGURE)
