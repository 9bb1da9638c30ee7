"""The configuration: the file, the environment, --set; and what its values do later."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.draw import Draw
from tests.fuzz.judge import Target
from tripletkit import config as configuration
from tripletkit import inputs, submission
from tripletkit.cluster import resources
from tripletkit.config import Config
from tripletkit.data import parquet
from tripletkit.errors import TripletkitError
from tripletkit.paths import LogPaths, run_paths, study_paths
from tripletkit.train.head import Head
from tripletkit.tune.budget import Budget

KEYS = [
    (name, key) for name, model in configuration.sections().items() for key in model.model_fields
]
FILE = Path("config.toml")


def use(config: Config) -> None:
    """What commands do with it first."""
    text = configuration.dump(config)
    FILE.write_text(text)
    assert configuration.load(FILE, environ={}) == config
    configuration.describe(config)
    for look in (
        lambda: run_paths(config.checkpoint_dir).saved(),
        lambda: [study_paths(config).identity.exists(), config.cache_dir.exists()],
        lambda: LogPaths(config.global_.log_dir).records(),
        lambda: resources.parameters(config.slurm),
        lambda: resources.workers(config, config.tuning.total),
        lambda: Budget(config, study_paths(config), slurm=True),
        lambda: inputs.check_files(config),
        lambda: parquet.find_files(inputs.parquet_path(config, "train")),
        lambda: submission._keep("train", config.model_copy(update={"global_": HERE})),
    ):
        try:
            look()
        except (TripletkitError, OSError):
            continue
    head = config.training_model
    if (
        head.hidden_dim * head.hidden_dim_multiplier**head.num_hidden_layers < 1000
        and head.output_dim < 1000
    ):
        Head(head, min(head.input_dim or 8, 100))


HERE = Config(global_={"log_dir": "logs"}).global_  # type: ignore[arg-type]


def _toml(data: bytes) -> None:
    FILE.write_bytes(data)
    use(configuration.load(FILE, environ={}))


def _settings(data: bytes) -> None:
    """Known and unknown keys with any value, from all sides."""
    draw = Draw(data)
    overrides: list[str] = []
    environ: dict[str, str] = {}
    for _ in range(1 + draw.below(4)):
        section, key = draw.of(KEYS)
        if draw.below(8) == 0:
            key = draw.of(
                ("space", f"space.{key}", "space.margin", "space.margin.low", draw.text())
            )
            key += draw.of(("", ".low", ".type", ".choices", ".low.x", ".", "..", ".a.b.c"))
        value = draw.text()
        if draw.flag():
            overrides.append(f"{section}.{key}={value}")
        else:
            environ[configuration.ENV_PREFIX + key.upper()] = value.replace("\0", "")
    path = None
    if draw.flag():
        path = FILE
        lines = []
        for _ in range(draw.below(3)):
            section, key = draw.of(KEYS)
            try:
                lines.append(f"[{section}]\n{key} = {configuration.toml_value(draw.value())}")
            except (TypeError, ValueError, AttributeError):
                lines.append(f"[{section}]\n{key} = {draw.text()}")
        FILE.write_text("\n".join(lines), errors="surrogateescape")
    use(configuration.load(path, overrides, environ))


def _limits(data: bytes) -> None:
    """Times, sizes and GPUs of [slurm]."""
    text = data.decode(errors="surrogateescape")
    for key in ("time", "mem", "gres", "mail", "account"):
        for value in (text, text[: len(text) // 2]):
            try:
                slurm = Config(slurm={key: value}).slurm  # type: ignore[arg-type]
            except ValueError:
                continue
            try:
                found = resources.parameters(slurm)
            except TripletkitError:
                continue
            assert found["time"] >= 1
            assert 0 <= resources.gpus(slurm) < 2**31
            assert "\n" not in "".join(map(str, found.values()))


def _files() -> list[bytes]:
    template = configuration.template().encode()
    nested = b"[training]\nmargin = " + b"[" * 3000
    return [
        template, nested, b"[tuning.space.margin]\ntype = 'float'\nlow = 0.1\nhigh = 1.0\n",
        b"[training]\nnum_epochs = " + b"9" * 5000, b"[training]\nnum_epochs = 0x" + b"f" * 6000,
        b"[global]\nseed = 3\n[slurm]\ntime = '1-00'\n", b"tuning = 3\n", b"[paths]\ncache_dir = 'a\\u0000b'\n",
        b"[tuning]\nspace = 3\n", b"[training]\nlearning_rate = inf\n", b"a.b.c.d = 1\n[a]\n", b"\xff\xfe",
    ]  # fmt: skip


TOML = Target(_toml, _files, [b"[training]\n", b"[tuning]\n", b" = ", b"inf", b"nan", b"'''", b"1e400", b"\\u0000",
                              *(f"{key} = ".encode() for _, key in KEYS)])  # fmt: skip
SETTINGS = Target(
    _settings,
    lambda: [
        bytes([i, j, k, 1, 9, 3, i, 0, j])
        for i in range(3)
        for j in range(0, 60, 7)
        for k in (0, 1)
    ],
)
LIMITS = Target(
    _limits,
    lambda: [b"1-12:30:00", b"90", b"30:00", b"32G", b"gpu:a100:4", b"gpu(S:0)", b"0", b"9" * 5000, b"0-0",
             b"9" * 400, "٣".encode(), b"gpu:" + b"9" * 5000, b"1\n2"],
    [b"gpu:", b"-", b":", b"00", b"GB", b"\n"],
)  # fmt: skip
