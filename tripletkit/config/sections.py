"""The sections of config.toml: keys, types, defaults, and what each is for."""

from __future__ import annotations

import difflib
import math
import os
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from tripletkit.errors import ConfigError


def expand(path: Path) -> Path:
    """Expand `~` and `$VARS`; a variable that is not set here (say on a login node) stays."""
    try:
        return Path(os.path.expandvars(path)).expanduser()
    except RuntimeError as error:  # ~nobody-here/...
        raise ValueError(str(error)) from None


def absolute(path: Path) -> Path:
    """Expand, and make independent of the current folder, so that a dumped file means the same."""
    path = expand(path)
    return path if str(path).startswith("$") else path.absolute()


AbsolutePath = Annotated[Path, AfterValidator(absolute)]
ScratchPath = Annotated[Path, AfterValidator(expand)]  # relative ones lie below scratch_dir


class Section(BaseModel):
    """A frozen table of the file. Its fields are the keys; their descriptions are the comments."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )

    @field_validator("*")
    @classmethod
    def _can_be_written_down(cls, value: object) -> object:
        """What files, TOML and the libraries below can hold: numbers of 64 bits, and text."""
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int) and not -(2**63) <= each < 2**63:
                raise ValueError("is beyond 64 bits")
            if isinstance(each, str | Path):
                text = str(each)
                if "\0" in text:
                    raise ValueError("holds a NUL character")
                if text.encode(errors="replace").decode() != text:
                    raise ValueError("holds bytes that are not UTF-8")
        return value


class Global(Section):
    """What every command shares."""

    seed: int = Field(42, ge=0, lt=2**31, description="Seed of every random draw.")
    log_dir: AbsolutePath = Field(Path("logs"), description="Folder of the job logs.")
    scratch_dir: AbsolutePath = Field(
        Path(),
        description="Fast disk with room; relative cache_dir, checkpoint_dir and output_dir lie here.",
    )


class Paths(Section):
    """Where the data comes from and where results go. A parquet path is a file, a folder or a glob."""

    train_parquet_path: AbsolutePath | None = Field(None, description="Training embeddings.")
    val_parquet_path: AbsolutePath | None = Field(
        None, description="Validation embeddings; without them there is no best epoch to choose."
    )
    test_parquet_path: AbsolutePath | None = Field(
        None, description="Test embeddings, read by evaluate only."
    )
    difficulty_metadata_path: AbsolutePath | None = Field(
        None,
        description="Difficulty bands, as `tripletkit data bands` writes them; "
        "without them every negative is random.",
    )
    checkpoint_dir: ScratchPath = Field(
        Path("checkpoints"), description="Checkpoints, metrics.jsonl, config.toml and train.log."
    )
    cache_dir: ScratchPath = Field(
        Path("cache"), description="Memory-mapped copies of the parquet files; safe to delete."
    )


WIDEST = 2**24  # of a layer; beyond, sizes of matrices overflow


class TrainingModel(Section):
    """The projection head."""

    input_dim: int | None = Field(
        None, ge=1, description="Width of the embeddings; read from the data when absent."
    )
    hidden_dim: int = Field(512, ge=1, description="Width of the first hidden layer.")
    num_hidden_layers: int = Field(1, ge=1, le=1000, description="Hidden layers.")
    hidden_dim_multiplier: float = Field(
        1.0, gt=0, description="Width of each further hidden layer, relative to the one before."
    )
    activation: Literal["gelu", "silu", "relu"] = Field("gelu", description="Activation.")
    output_dim: int = Field(256, ge=1, description="Width of the specialised embedding.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout behind each block.")
    use_residual: bool = Field(
        True, description='Linear shortcut from input to output; init = "lda" and "pca" need it.'
    )
    use_layer_norm: bool = Field(True, description="LayerNorm in each block.")

    @model_validator(mode="after")
    def _layers_can_be_built(self) -> TrainingModel:
        # As logarithms: the width itself may be beyond any number.
        growth = (self.num_hidden_layers - 1) * max(0.0, math.log(self.hidden_dim_multiplier))
        hidden = math.log(self.hidden_dim) + growth
        for width in (hidden, math.log(self.output_dim), math.log(self.input_dim or 1)):
            if width > math.log(WIDEST):
                raise ValueError(f"a layer of the head would be wider than {WIDEST:,}")
        return self


Reward = Literal["useful_rate", "violation_rate", "loss", "negative_loss"]
RETRIEVAL_METRIC = r"recall@[1-9]\d*|map@r|mrr|r_precision"


class Training(Section):
    """The trainer."""

    batch_size: int = Field(256, ge=1, description="Triplets per step.")
    num_epochs: int = Field(50, ge=0, description="Epochs; in each, every anchor comes once.")
    learning_rate: float = Field(1e-4, gt=0, description="AdamW's learning rate.")
    weight_decay: float = Field(1e-5, ge=0, description="AdamW's weight decay.")
    margin: float = Field(0.5, gt=0, description="Margin of the triplet loss.")
    loss_distance: Literal["euclidean", "cosine"] = Field(
        "euclidean", description="Distance in the loss."
    )
    init: Literal["lda", "pca", "random"] = Field(
        "lda", description="Start of the head: from the data (lda, pca) or from noise."
    )
    negative_sampler: str = Field(
        "ucb",
        pattern=r"^(ucb|uniform|random|fixed:\d+)$",
        description='Who picks the band of a negative: "ucb" (the bandit), "uniform" over bands, '
        '"random" negatives, or "fixed:<band>".',
    )
    ucb_reward: Reward = Field(
        "negative_loss", description="What the bandit maximises; see docs/ablation.md."
    )
    ucb_exploration_constant: float = Field(
        2.0, ge=0, description="c in mean + c * sqrt(ln n / n_band)."
    )
    ucb_warmup_samples: int = Field(
        1000, ge=0, description="Rewards to see before the bandit decides; uniform until then."
    )
    ucb_discount: float = Field(
        0.9, gt=0, le=1, description="Per-step forgetting of old rewards; 1.0 never forgets."
    )
    ucb_floor: float = Field(
        0.0, ge=0, le=1, description="Share of each batch that is spread uniformly over the bands."
    )
    save_every_n_epochs: int = Field(
        5, ge=1, description="Keep a checkpoint_epoch_N.pt this often."
    )
    checkpoint_every_minutes: float = Field(
        10.0, gt=0, description="Refresh checkpoint_last.pt this often, also within an epoch."
    )
    validate_every_n_epochs: int = Field(1, ge=1, description="Validate this often.")
    resume_from_checkpoint: str = Field(
        "auto",
        description='A checkpoint, "auto" (the newest good one in checkpoint_dir, if any) or "none".',
    )
    early_stopping_patience: int = Field(
        0, ge=0, description="Validations without improvement before stopping; 0 never stops early."
    )
    monitor: str = Field(
        "val_loss",
        pattern=rf"^(val_loss|{RETRIEVAL_METRIC})$",
        description='What "best" means: "val_loss", "recall@K", "map@r", "mrr" or "r_precision".',
    )
    retrieval_metric_top_k: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 5, 10, 100, 1000], min_length=1, description="The k of recall@k."
    )
    retrieval_metric_max_queries: int = Field(
        0, ge=0, description="Queries per validation, drawn by the seed; 0 asks all of them."
    )
    sample_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the training buildings to use."
    )
    sample_buildings: int = Field(0, ge=0, description="Training buildings to use; 0 uses all.")
    val_sample_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the validation buildings to use."
    )
    val_sample_buildings: int = Field(
        0, ge=0, description="Validation buildings to use; 0 uses all."
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description='"auto", "cpu" or "cuda".'
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="auto: bf16 where the hardware is faster with it (GPUs; CPUs with AMX), else fp32. "
        "Loss and norms stay fp32.",
    )
    placement: Literal["auto", "device", "host"] = Field(
        "auto",
        description="Where the embeddings lie: in the device's memory, or on disk with prefetching.",
    )
    best_training_metric_name: str = Field(
        "recall@100", description="submit-best: the metric that ranks W&B runs."
    )
    best_training_trial_name_pattern: str = Field(
        "trial_*", description="submit-best: which W&B runs are trials."
    )

    @field_validator("resume_from_checkpoint")
    @classmethod
    def _expand_named_checkpoint(cls, value: str) -> str:
        return value if value in ("auto", "none") else str(absolute(Path(value)))

    @model_validator(mode="after")
    def _monitored_k_is_computed(self) -> Training:
        if self.monitor.startswith("recall@"):
            k = int(self.monitor.removeprefix("recall@"))
            if k not in self.retrieval_metric_top_k:
                raise ValueError(
                    f"monitor is {self.monitor!r}, but {k} is not in retrieval_metric_top_k "
                    f"{self.retrieval_metric_top_k}"
                )
        return self


class Logging(Section):
    """What a run tells while it runs. metrics.jsonl is always written."""

    log_every_n_batches: int = Field(100, ge=1, description="Progress in the log this often.")
    log_file: AbsolutePath | None = Field(None, description="One more copy of the log.")
    wandb_enabled: bool = Field(False, description="Report to Weights & Biases (extra: wandb).")
    wandb_project: str = Field("tripletkit", description="W&B project.")
    wandb_run_name: str | None = Field(None, description="W&B run name.")
    wandb_mode: Literal["online", "offline"] = Field(
        "online", description='"offline" writes to disk for a later `wandb sync`.'
    )
    tensorboard: bool = Field(False, description="Write TensorBoard events (extra: tensorboard).")


def _check_range(low: float, high: float, *, log: bool) -> None:
    if low > high:
        raise ValueError(f"low {low} is above high {high}")
    if log and low <= 0:
        raise ValueError(f"log = true needs low above 0, not {low}")


class FloatRange(Section):
    """A real-valued hyperparameter."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _low_below_high(self) -> FloatRange:
        _check_range(self.low, self.high, log=self.log)
        return self


class IntRange(Section):
    """An integer hyperparameter."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _low_below_high(self) -> IntRange:
        _check_range(self.low, self.high, log=self.log)
        if self.log and self.step != 1:
            raise ValueError("step and log exclude each other")
        return self


class Choice(Section):
    """A hyperparameter from a list."""

    type: Literal["categorical"]
    choices: list[bool | int | float | str] = Field(min_length=1)


Range = Annotated[FloatRange | IntRange | Choice, Field(discriminator="type")]

# The study itself decides these.
NOT_TUNED = ("num_epochs", "resume_from_checkpoint", "monitor", "validate_every_n_epochs")

_HOST = r"([^][:@/?#,]*|\[[\da-fA-F:.]*\])(:\d*)?"
# user@host:port/database?option=value: an @ in a value, not followed by what ends a host, is one.
PLAIN_ADDRESS = re.compile(
    rf"([^:@/?#]*@)?{_HOST}(,{_HOST})*/[^:@/?#]*\?\w+=[^:/?#&=]*(&\w+=[^:/?#&=]*)*"
)

DEFAULT_SPACE: dict[str, Range] = {
    "learning_rate": FloatRange(type="float", low=5e-5, high=5e-3, log=True),
    "weight_decay": FloatRange(type="float", low=1e-6, high=1e-2, log=True),
    "margin": FloatRange(type="float", low=0.1, high=1.0),
    "hidden_dim": Choice(type="categorical", choices=[256, 512, 1024]),
    "dropout": FloatRange(type="float", low=0.0, high=0.4),
}


class Tuning(Section):
    """The study. `[tuning.space.<key>]` gives the range of any `training` or `training_model` key."""

    study_name: str = Field(
        "tripletkit",
        max_length=100,  # names of files are made of it, and file systems take 255 bytes
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the study, of its folder and its jobs: letters, digits, . _ and -",
    )
    storage_path: AbsolutePath = Field(
        Path("study.db"),
        description="SQLite file of the study; a file *.journal is an Optuna journal, a folder is "
        "that of `tripletkit db up` (PostgreSQL).",
    )
    storage_url: str | None = Field(
        None,
        description="A PostgreSQL of yours instead, postgresql://user@host/database; its password "
        "belongs in PGPASSFILE.",
    )
    output_dir: ScratchPath = Field(
        Path("trials"), description="Holds a folder per study, and in it one per trial."
    )
    workers: int = Field(1, ge=1, description="Workers that share the study.")
    trials_per_worker: int = Field(
        1, ge=1, description="Trials of a worker on average: whoever is free takes the next one."
    )
    trials_per_gpu: int = Field(
        1,
        ge=1,
        description="Trials at once on each GPU of a worker; without a GPU, on its cores.",
    )
    n_trials: int = Field(
        0, ge=0, description="Exact total of the study; 0 means workers * trials_per_worker."
    )
    budget_gpu_hours: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="GPU-hours that the trials may take; then none starts any more. 0 is no limit; "
        "without GPUs, worker-hours.",
    )
    max_epochs: int = Field(15, ge=1, description="Epochs of one trial.")
    objective: str = Field(
        "recall@100",
        pattern=rf"^(val_loss|{RETRIEVAL_METRIC})$",
        description="What a trial reports each epoch and is judged by.",
    )
    direction: Literal["auto", "maximize", "minimize"] = Field(
        "auto", description='Of the objective: "auto" minimises val_loss, maximises the others.'
    )
    sampler: Literal["tpe", "random"] = Field("tpe", description="How parameters are proposed.")
    pruner: Literal["median", "successive_halving", "none"] = Field(
        "median", description="How bad trials end early."
    )
    keep_checkpoints: Literal["all", "best"] = Field(
        "all",
        description='Of a trial that is over: "best" keeps checkpoint_best.pt alone, a third of the '
        "bytes.",
    )
    space: dict[str, Range] = Field(DEFAULT_SPACE, description="The search space.")

    @field_validator("storage_path", mode="before")
    @classmethod
    def _no_address_as_a_path(cls, value: object) -> object:
        if "://" in str(value):
            raise ValueError(
                "is an address: write the path alone, or a PostgreSQL's address as storage_url"
            )
        return value

    @field_validator("storage_url")
    @classmethod
    def _no_password_in_the_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            url = urlsplit(value)
        except ValueError:  # its message repeats what is between brackets
            raise ValueError("is not a valid address") from None
        if url.scheme not in ("postgresql", "postgres", "postgresql+psycopg2"):
            raise ValueError(
                "must begin with postgresql:// (SQLite and journal files go into storage_path)"
            )
        if not value.startswith(f"{url.scheme}://"):
            raise ValueError("must begin with postgresql://")
        options = parse_qs(url.query, keep_blank_values=True)  # also sslpassword is one
        # A password may hold what ends a host elsewhere, as in user:a/b@host.
        rest = value.partition("://")[2]
        before = "" if PLAIN_ADDRESS.fullmatch(rest) else rest.rpartition("@")[0]
        if ":" in before or "password=" in value or any("password" in k.lower() for k in options):
            raise ValueError(
                "holds a password, which would end up in logs and run folders: take it out and "
                "put it into the file that PGPASSFILE names"
            )
        return value

    @model_validator(mode="after")
    def _direction_of_the_objective(self) -> Tuning:
        right = "minimize" if self.objective == "val_loss" else "maximize"
        if self.direction not in ("auto", right):
            raise ValueError(f"direction is {self.direction!r}, but {self.objective} is to {right}")
        return self

    @property
    def total(self) -> int:
        """Trials of the whole study."""
        return self.n_trials or self.workers * self.trials_per_worker


class Slurm(Section):
    """What a job asks of Slurm."""

    account: str | None = Field(None, description="Account that is charged.")
    partition: str | None = Field(None, description="Partition.")
    qos: str | None = Field(None, description="Quality of service.")
    time: str = Field("03:00:00", description="Time limit, as sbatch reads it.")
    mem: str = Field("32G", description="Memory of a job.")
    cpus_per_task: int = Field(4, ge=1, description="Cores of a job.")
    gpus: int = Field(1, ge=0, description="GPUs of a job.")
    gres: str | None = Field(None, description="A gres string instead of gpus.")
    constraint: str | None = Field(None, description="Node features.")
    setup: list[str] = Field([], description="Shell lines before the job: modules, venv.")
    max_concurrent: int = Field(0, ge=0, description="Array elements at once; 0 is no limit.")
    mail: str | None = Field(
        None,
        description="Address for mail at the end of a job, or a user's name; of a study, at its end "
        "and when a worker fails.",
    )


class Config(Section):
    """The whole file."""

    model_config = ConfigDict(populate_by_name=True)

    global_: Global = Field(default_factory=Global, alias="global")
    paths: Paths = Field(default_factory=Paths)
    training_model: TrainingModel = Field(default_factory=TrainingModel)
    training: Training = Field(default_factory=Training)
    logging: Logging = Field(default_factory=Logging)
    tuning: Tuning = Field(default_factory=Tuning)
    slurm: Slurm = Field(default_factory=Slurm)

    @model_validator(mode="after")
    def _start_from_data_needs_the_shortcut(self) -> Config:
        if self.training.init != "random" and not self.training_model.use_residual:
            raise ValueError(
                f"training.init = {self.training.init!r} starts the head through its linear "
                'shortcut: set training_model.use_residual = true or training.init = "random"'
            )
        return self

    @model_validator(mode="after")
    def _space_is_of_known_keys(self) -> Config:
        for key, range_ in self.tuning.space.items():
            section = section_of(key)
            bounds = range_.choices if isinstance(range_, Choice) else [range_.low, range_.high]
            for value in bounds:
                values = {**getattr(self, section).model_dump(), key: value}
                try:
                    getattr(self, section).model_validate(values)
                except ValidationError as error:
                    why = error.errors(include_url=False)[0]["msg"]
                    raise ValueError(
                        f"tuning.space.{key}: {value!r} cannot be used: {why}"
                    ) from None
        return self

    @property
    def cache_dir(self) -> Path:
        """`paths.cache_dir`, below `global.scratch_dir` when relative."""
        return _on_disk(self.global_.scratch_dir / self.paths.cache_dir)

    @property
    def checkpoint_dir(self) -> Path:
        """`paths.checkpoint_dir`, below `global.scratch_dir` when relative."""
        return _on_disk(self.global_.scratch_dir / self.paths.checkpoint_dir)

    @property
    def output_dir(self) -> Path:
        """`tuning.output_dir`, below `global.scratch_dir` when relative."""
        return _on_disk(self.global_.scratch_dir / self.tuning.output_dir)


def section_of(key: str) -> Literal["training", "training_model"]:
    """The section that a tuned key belongs to. Raises ValueError for a key that cannot be tuned."""
    if key in TrainingModel.model_fields and key != "input_dim":
        return "training_model"
    if key in Training.model_fields and key not in NOT_TUNED:
        return "training"
    tunable = [*TrainingModel.model_fields, *Training.model_fields]
    near = difflib.get_close_matches(key, tunable, 1, cutoff=0)[0]
    raise ValueError(
        f"tuning.space.{key}: not a key that can be tuned; did you mean {near!r}?"
        if near not in (key, "input_dim", *NOT_TUNED)
        else f"tuning.space.{key}: not a key that can be tuned"
    )


def _on_disk(folder: Path) -> Path:
    """`folder`, unless a variable in it is not set here: it would become a folder named "$X"."""
    unset = [part for part in folder.parts if part.startswith("$")]
    if unset:
        raise ConfigError(
            f"{folder}: the environment variable {unset[0]} is not set",
            hint="export it, or write the path in full",
        )
    return folder
