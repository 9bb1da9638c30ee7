"""The configuration: typed sections, read from TOML, the environment and the command line.

Order of precedence: command line > environment > file > default. Only the command line and the
stages see the whole `Config`; everything below takes the section it needs.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tripletkit.errors import ConfigError
from tripletkit.log import logger

ENV_PREFIX = "TRIPLET_TRAINING_"
DEFAULT_FILE = Path("config.toml")


def expand(path: Path) -> Path:
    """Expand `~` and `$VARS`; a variable that is not set here (say on a login node) stays."""
    return Path(os.path.expandvars(path)).expanduser()


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


class Global(Section):
    """What every command shares."""

    seed: int = Field(42, ge=0, lt=2**31, description="Seed of every random draw.")
    log_dir: AbsolutePath = Field(Path("logs"), description="Folder of the job logs.")
    scratch_dir: AbsolutePath = Field(
        Path(),
        description="Fast disk with room; relative cache_dir and checkpoint_dir lie here.",
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


class TrainingModel(Section):
    """The projection head."""

    input_dim: int | None = Field(
        None, ge=1, description="Width of the embeddings; read from the data when absent."
    )
    hidden_dim: int = Field(512, ge=1, description="Width of the first hidden layer.")
    num_hidden_layers: int = Field(1, ge=1, description="Hidden layers.")
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
        "useful_rate", description="What the bandit maximises; see docs/ablation.md."
    )
    ucb_exploration_constant: float = Field(
        2.0, ge=0, description="c in mean + c * sqrt(ln n / n_band)."
    )
    ucb_warmup_samples: int = Field(
        1000, ge=0, description="Rewards to see before the bandit decides; uniform until then."
    )
    ucb_discount: float = Field(
        1.0, gt=0, le=1, description="Per-step forgetting of old rewards; 1.0 never forgets."
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
        "auto", description="auto: bf16 on a GPU that has it, else fp32. Loss and norms stay fp32."
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


class FloatRange(Section):
    """A real-valued hyperparameter."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False


class IntRange(Section):
    """An integer hyperparameter."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: int = Field(1, ge=1)


class Choice(Section):
    """A hyperparameter from a list."""

    type: Literal["categorical"]
    choices: list[bool | int | float | str] = Field(min_length=1)


Range = Annotated[FloatRange | IntRange | Choice, Field(discriminator="type")]

DEFAULT_SPACE: dict[str, Range] = {
    "learning_rate": FloatRange(type="float", low=5e-5, high=5e-3, log=True),
    "weight_decay": FloatRange(type="float", low=1e-6, high=1e-2, log=True),
    "margin": FloatRange(type="float", low=0.1, high=1.0),
    "hidden_dim": Choice(type="categorical", choices=[256, 512, 1024]),
    "dropout": FloatRange(type="float", low=0.0, high=0.4),
}


class Tuning(Section):
    """The study. `[tuning.space.<key>]` gives the range of any `training` or `training_model` key."""

    study_name: str = Field("tripletkit", description="Name of the study.")
    storage_path: AbsolutePath = Field(Path("study.db"), description="SQLite file of the study.")
    storage_url: str | None = Field(
        None, description="PostgreSQL instead of SQLite; the password belongs in PGPASSFILE."
    )
    output_dir: AbsolutePath = Field(Path("trials"), description="One folder per trial.")
    workers: int = Field(1, ge=1, description="Workers that share the study.")
    trials_per_worker: int = Field(1, ge=1, description="Trials that each worker runs.")
    n_trials: int = Field(0, ge=0, description="Exact total; 0 means workers * trials_per_worker.")
    max_epochs: int = Field(15, ge=1, description="Epochs of one trial.")
    objective: str = Field(
        "recall@100",
        pattern=rf"^(val_loss|{RETRIEVAL_METRIC})$",
        description="What a trial reports each epoch and is judged by.",
    )
    direction: Literal["maximize", "minimize"] = Field(
        "maximize", description='Of the objective; "minimize" for val_loss.'
    )
    sampler: Literal["tpe", "random"] = Field("tpe", description="How parameters are proposed.")
    pruner: Literal["median", "successive_halving", "none"] = Field(
        "median", description="How bad trials end early."
    )
    space: dict[str, Range] = Field(DEFAULT_SPACE, description="The search space.")


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
    mail: str | None = Field(None, description="Address for mail at the end of a job.")


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

    @property
    def cache_dir(self) -> Path:
        """`paths.cache_dir`, below `global.scratch_dir` when relative."""
        return self.global_.scratch_dir / self.paths.cache_dir

    @property
    def checkpoint_dir(self) -> Path:
        """`paths.checkpoint_dir`, below `global.scratch_dir` when relative."""
        return self.global_.scratch_dir / self.paths.checkpoint_dir


def sections() -> dict[str, type[Section]]:
    """Section name in the file -> its model, in the order of the file."""
    return {
        field.alias or name: field.annotation  # type: ignore[misc]
        for name, field in Config.model_fields.items()
    }


def load(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """Read the configuration.

    `path` defaults to config.toml in the current folder, if there is one. `overrides` are
    `section.key=value` strings. Raises `ConfigError` naming the file, section and key.
    """
    if path is None and DEFAULT_FILE.exists():
        path = DEFAULT_FILE
    raw: dict[str, Any] = {}
    origin: dict[tuple[str, str], str] = {}  # where a value came from, for the error message
    if path is not None:
        raw = _read_file(path)
        origin = {(s, k): f"{path}, [{s}] {k}" for s, table in raw.items() for k in table}
    for section, key, text, source in [*_from_environment(environ), *_from_flags(overrides)]:
        _assign(raw, section, key, text)
        origin[section, key] = source
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, origin) from None


def dump(config: Config) -> str:
    """The effective configuration as TOML; reading it gives an equal `Config`."""
    return tomli_w.dumps(config.model_dump(mode="json", by_alias=True, exclude_none=True))


def describe(config: Config) -> dict[str, Any]:
    """The keys that shape a run's result, as plain values for trackers."""
    return config.model_dump(
        mode="json",
        by_alias=True,
        include={"global_": {"seed"}, "training_model": True, "training": True},
    )


def with_values(config: Config, **sections_: Mapping[str, Any]) -> Config:
    """A copy with some keys replaced, validated anew: `with_values(c, training={"margin": 1})`."""
    raw = config.model_dump(by_alias=True)
    for section, values in sections_.items():
        raw[section.rstrip("_")].update(values)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, {}) from None


def template(values: Mapping[str, Mapping[str, object]] | None = None) -> str:
    """A commented config.toml that holds every key; `values` replaces some defaults."""
    lines = [
        "# tripletkit configuration. Every key is shown with its default; keys without one are",
        "# commented out. TRIPLET_TRAINING_<KEY> in the environment and --set section.key=value",
        "# on the command line take precedence. `~` and `$VARS` expand in paths.",
    ]
    for name, model in sections().items():
        lines += ["", f"# {model.__doc__}", f"[{name}]"]
        for key, field in model.model_fields.items():
            if key == "space":
                continue
            lines.append(f"# {field.description}")
            value = (values or {}).get(name, {}).get(key, field.get_default())
            lines.append(f"# {key} =" if value is None else f"{key} = {toml_value(value)}")
    for key, range_ in DEFAULT_SPACE.items():
        lines += ["", f"[tuning.space.{key}]"]
        table = range_.model_dump(exclude_defaults=True)
        lines += [f"{k} = {toml_value(v)}" for k, v in table.items()]
    return "\n".join(lines) + "\n"


def toml_value(value: object) -> str:
    """One value as TOML, on one line."""
    if isinstance(value, Path):
        value = str(value)
    return (
        tomli_w.dumps({"v": value}, multiline_strings=False)
        .removeprefix("v = ")
        .strip()
        .replace("[\n    ", "[")
        .replace(",\n    ", ", ")
        .replace(",\n]", "]")
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration file {path}", hint="`tripletkit init` writes one"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    known = sections()
    for name, table in list(raw.items()):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            logger.warning(
                "%s: section [%s] is not one of ours and is ignored%s",
                path,
                name,
                f" (did you mean [{near[0]}]?)" if near else "",
            )
            del raw[name]
        elif not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} must be a section, written as [{name}]")
        else:
            for key in table:
                _check_key(name, key, f"{path}, section [{name}]")
    return raw


def _check_key(section: str, key: str, where: str) -> None:
    known = sections()[section].model_fields
    if key in known:
        return
    elsewhere = [name for name, model in sections().items() if key in model.model_fields]
    if elsewhere:
        hint = f"{key!r} belongs to [{elsewhere[0]}]"
    else:
        near = difflib.get_close_matches(key, known, 1, cutoff=0)
        hint = f"did you mean {near[0]!r}?"
    raise ConfigError(f"{where}: there is no key {key!r}", hint=hint)


def _from_environment(environ: Mapping[str, str]) -> list[tuple[str, str, str, str]]:
    owner = {key.upper(): (s, key) for s, model in sections().items() for key in model.model_fields}
    found = []
    for variable in sorted(v for v in environ if v.startswith(ENV_PREFIX)):
        name = variable.removeprefix(ENV_PREFIX)
        if name not in owner:
            near = difflib.get_close_matches(name, owner, 1, cutoff=0)[0]
            raise ConfigError(
                f"environment variable {variable} matches no key",
                hint=f"did you mean {ENV_PREFIX}{near}?",
            )
        found.append((*owner[name], environ[variable], f"environment variable {variable}"))
    return found


def _from_flags(overrides: Sequence[str]) -> list[tuple[str, str, str, str]]:
    found = []
    for text in overrides:
        match = re.fullmatch(r"([a-z_]+)\.([a-z0-9_.]+)=(.*)", text, re.DOTALL)
        if match is None:
            raise ConfigError(f"--set {text}: not of the form section.key=value")
        section, key, value = match.groups()
        if section not in sections():
            near = difflib.get_close_matches(section, sections(), 1, cutoff=0)[0]
            raise ConfigError(
                f"--set {text}: no section {section!r}", hint=f"did you mean {near!r}?"
            )
        _check_key(section, key.partition(".")[0], f"--set {text}")
        found.append((section, key, value, f"--set {text}"))
    return found


def _assign(raw: dict[str, Any], section: str, key: str, text: str) -> None:
    """Put `text` at its place; text becomes a list or table only where the key holds one."""
    name, _, rest = key.partition(".")
    table = raw.setdefault(section, {})
    if rest:  # tuning.space.learning_rate.low=1e-5
        if key.startswith("space."):  # change one range, keep the others
            table.setdefault("space", {k: r.model_dump() for k, r in DEFAULT_SPACE.items()})
        *folders, name = key.split(".")
        for folder in folders:
            table = table.setdefault(folder, {})
        table[name] = _parse(text)
        return
    annotation = sections()[section].model_fields[name].annotation
    if _holds(annotation, list):
        value = _parse(text)
        table[name] = (
            value if isinstance(value, list) else [part.strip() for part in text.split(",")]
        )
    elif _holds(annotation, dict):
        table[name] = _parse(text)
    elif text == "" and _holds(annotation, type(None)):
        table[name] = None
    else:
        table[name] = text


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _holds(annotation: Any, kind: type) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(_holds(part, kind) for part in get_args(annotation))
    return annotation is kind or get_origin(annotation) is kind


def _explain(error: ValidationError, origin: Mapping[tuple[str, str], str]) -> ConfigError:
    lines = []
    for problem in error.errors(include_url=False):
        place = [str(part) for part in problem["loc"]]
        section, key = [*place, "", ""][:2]
        where = origin.get((section, key), f"[{section}] {'.'.join(place[1:])}".strip())
        message = problem["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        if key and not isinstance(problem["input"], dict):
            message += f" (got {problem['input']!r})"
        lines.append(f"{where}: {message}")
    return ConfigError("\n".join(lines))
