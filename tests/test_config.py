"""Configuration: precedence, typo errors, round trips."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import GENERATED
from tripletkit import config
from tripletkit.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def refused(path: Path | None = None, overrides=(), environ=None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides, environ or {})
    assert caught.value.exit_code == 2
    return caught.value


def test_command_line_beats_environment_beats_file_beats_default(tmp_path):
    path = write(tmp_path, "[training]\nmargin = 0.1\nbatch_size = 7\nnum_epochs = 3\n")
    environ = {"TRIPLET_TRAINING_MARGIN": "0.2", "TRIPLET_TRAINING_BATCH_SIZE": "8"}
    loaded = config.load(path, ["training.margin=0.3"], environ).training
    assert (loaded.margin, loaded.batch_size, loaded.num_epochs) == (0.3, 8, 3)
    assert loaded.weight_decay == config.Training().weight_decay


def test_environment_alone_is_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = config.load(environ={"TRIPLET_TRAINING_TRAIN_PARQUET_PATH": "/data/train.parquet"})
    assert loaded.paths.train_parquet_path == Path("/data/train.parquet")


def test_config_toml_of_the_current_folder_is_read_without_being_named(tmp_path, monkeypatch):
    write(tmp_path, "[global]\nseed = 7\n")
    monkeypatch.chdir(tmp_path)
    assert config.load(environ={}).global_.seed == 7


def test_every_key_lives_in_one_section_only():
    """So that TRIPLET_TRAINING_<KEY> names one key."""
    keys = [key for model in config.sections().values() for key in model.model_fields]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1, 5,10", [1, 5, 10]), ("[1, 5, 10]", [1, 5, 10]), ("10", [10])],
)
def test_lists_are_written_with_commas_or_as_toml(text, expected):
    for loaded in (
        config.load(None, [f"training.retrieval_metric_top_k={text}"], {}),
        config.load(None, (), {"TRIPLET_TRAINING_RETRIEVAL_METRIC_TOP_K": text}),
    ):
        assert loaded.training.retrieval_metric_top_k == expected


def test_text_stays_text_even_if_it_looks_like_a_number():
    assert config.load(None, ["tuning.study_name=2024"], {}).tuning.study_name == "2024"


def test_mistyped_key_names_file_section_key_and_the_nearest(tmp_path):
    path = write(tmp_path, "[training]\nlearning_rat = 0.1\n")
    error = refused(path)
    assert error.message == f"{path}, section [training]: there is no key 'learning_rat'"
    assert error.hint == "did you mean 'learning_rate'?"


def test_key_in_the_wrong_section_is_told_its_own(tmp_path):
    assert refused(write(tmp_path, "[training]\nhidden_dim = 3\n")).hint == (
        "'hidden_dim' belongs to [training_model]"
    )


def test_mistyped_environment_variable_names_the_nearest():
    error = refused(environ={"TRIPLET_TRAINING_LERNING_RATE": "1"})
    assert "TRIPLET_TRAINING_LERNING_RATE" in error.message
    assert error.hint == "did you mean TRIPLET_TRAINING_LEARNING_RATE?"


def test_unknown_section_is_a_warning_because_files_are_shared(tmp_path, caplog):
    loaded = config.load(write(tmp_path, "[trainin]\nx = 1\n[clustering]\ny = 2\n"), (), {})
    assert loaded == config.load(None, (), {}) or loaded == config.Config()
    assert [r.getMessage().split(": ", 1)[1] for r in caplog.records] == [
        "section [trainin] is not one of ours and is ignored (did you mean [training]?)",
        "section [clustering] is not one of ours and is ignored",
    ]


@pytest.mark.parametrize(
    ("override", "where", "what"),
    [
        ("training.margin=-1", "--set training.margin", "greater than 0"),
        ("training.margin=nan", "--set training.margin", "finite"),
        ("training.batch_size=2.5", "--set training.batch_size", "integer"),
        ("training.negative_sampler=hard", "--set training.negative_sampler", "pattern"),
        ("training.monitor=recall@7", "[training]", "7 is not in retrieval_metric_top_k"),
        ("training_model.use_residual=false", "", "set training_model.use_residual = true"),
        (
            "training.retrieval_metric_top_k=1,x",
            "--set training.retrieval_metric_top_k",
            "valid integer",
        ),
    ],
)
def test_bad_value_names_where_it_came_from(override, where, what):
    message = refused(overrides=[override]).message
    assert where in message
    assert what in message


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("trainin.margin=1", "did you mean 'training'?"),
        ("training.margn=1", "did you mean 'margin'?"),
    ],
)
def test_mistyped_override_names_the_nearest(override, hint):
    error = refused(overrides=[override])
    assert error.message.startswith(f"--set {override.removesuffix('=1')}: ")
    assert error.hint == hint


def test_override_must_have_a_value():
    assert "section.key=value" in refused(overrides=["training.margin"]).message


def test_broken_toml_missing_file_and_folder_are_explained(tmp_path):
    assert "not valid TOML" in refused(write(tmp_path, "[training\n")).message
    assert refused(tmp_path / "nowhere.toml").hint == "`tripletkit init` writes one"
    assert "cannot read" in refused(tmp_path).message


def test_home_and_variables_expand_in_paths_and_unset_ones_wait(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("PLACE", "/scratch/ada")
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    paths = config.load(
        None,
        [
            "paths.train_parquet_path=~/a.parquet",
            "paths.val_parquet_path=$PLACE/b.parquet",
            "paths.test_parquet_path=$SLURM_TMPDIR/c.parquet",
        ],
        {},
    ).paths
    assert paths.train_parquet_path == Path("/home/ada/a.parquet")
    assert paths.val_parquet_path == Path("/scratch/ada/b.parquet")
    assert paths.test_parquet_path == Path("$SLURM_TMPDIR/c.parquet")


def test_unknown_home_is_explained():
    message = refused(overrides=["paths.cache_dir=~nobody-of-this-name/x"]).message
    assert "nobody-of-this-name" in message


def test_named_checkpoint_is_a_path_like_the_others(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    loaded = config.load(None, ["training.resume_from_checkpoint=~/a.pt"], {})
    assert loaded.training.resume_from_checkpoint == "/home/ada/a.pt"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:SECRET@h/db",
        "postgresql://u@h/db?password=SECRET",
        "postgresql://u@h/db?sslmode=require&sslpassword=SECRET",
        "postgresql://u@h/db?SSLPassw%6Frd=SECRET",
        "postgresql://u:1SECRET/x?y=z@h/db",
        "postgresql://u:1/x?y=SECRET@h/db",
        "postgresql://u:1?y=SECRET@h",
        "postgresql://u:1/x?SECRET@h",
        "postgresql://u:1/x?y=z#SECRET@h",
    ],
)
def test_password_in_the_storage_url_is_refused_and_not_repeated(url):
    message = refused(overrides=[f"tuning.storage_url={url}"]).message
    assert "PGPASSFILE" in message
    assert "SECRET" not in message


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u@h:5432/d?application_name=a@b",
        "postgresql://h:5432/d?user=me@x",
        "postgresql://u@[::1]:5432,h2:5433/d?user=me@x&application_name=a@b",
    ],
)
def test_an_at_sign_in_an_option_of_the_storage_url_is_no_password(url):
    assert config.load(None, [f"tuning.storage_url={url}"], {}).tuning.storage_url == url


@pytest.mark.parametrize(
    "override",
    [
        "tuning.storage_ur=postgresql://u:SECRET@h/db",
        "tunin.storage_url=postgresql://u:SECRET@h/db",
        "tuning.storage-url=postgresql://u:SECRET@h/db",
        "tuning.storage_url.x=postgresql://u:SECRET@h/db",
        "postgresql://u:SECRET@h/db",
        "tuning.storage_path=postgresql://u:SECRET@h/db",
        "tuning.storage_url=mysql://u:SECRET@h/db",
        "tuning.storage_url=postgresql://u:[SECRET]@h/db",
        "slurm.setup=[{PGPASSWORD='SECRET'}]",
        "slurm.setup=[['export PGPASSWORD=SECRET']]",
    ],
)
def test_a_value_that_may_hold_a_password_is_never_repeated(override):
    error = refused(overrides=[override])
    assert "SECRET" not in error.message + str(error.hint)


def test_a_value_of_the_file_that_may_hold_a_password_is_never_repeated(tmp_path):
    for line in ('setup = "export PGPASSWORD=SECRET"', 'setup = { PGPASSWORD = "SECRET" }'):
        assert "SECRET" not in refused(write(tmp_path, f"[slurm]\n{line}\n")).message


def test_where_the_study_is_the_last_word_counts(tmp_path):
    """A storage_url comes before a storage_path only where both are said at one place."""
    url, path = "postgresql://me@h/production", tmp_path / "test.journal"
    file = write(tmp_path, f"[tuning]\nstorage_url = '{url}'\nstorage_path = 'study.db'\n")
    environ = {"TRIPLET_TRAINING_STORAGE_PATH": str(path)}
    both = {**environ, "TRIPLET_TRAINING_STORAGE_URL": url + "2"}
    flag = f"tuning.storage_path={path}"

    def where(*given):
        tuning = config.load(file, *given).tuning
        return tuning.storage_url or tuning.storage_path

    assert where((), {}) == url
    assert where([flag], {}) == path
    assert where((), environ) == path
    assert where((), both) == url + "2"
    assert where([flag], both) == path
    assert where([f"tuning.storage_url={url}3"], environ) == url + "3"


def test_a_value_is_not_a_table():
    assert "is a value" in refused(overrides=["training.margin.x=1"]).message


def test_a_variable_that_is_not_set_never_becomes_a_folder(monkeypatch):
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    loaded = config.load(None, ["paths.cache_dir=$SLURM_TMPDIR/cache"], {})
    with pytest.raises(ConfigError, match="SLURM_TMPDIR is not set"):
        _ = loaded.cache_dir


def test_relative_run_folders_lie_on_scratch():
    loaded = config.load(None, ["global.scratch_dir=/scratch", "paths.cache_dir=c"], {})
    assert loaded.cache_dir == Path("/scratch/c")
    assert loaded.checkpoint_dir == Path("/scratch/checkpoints")
    assert loaded.output_dir == Path("/scratch/trials")
    absolute = config.load(None, ["global.scratch_dir=/scratch", "paths.cache_dir=/c"], {})
    assert absolute.cache_dir == Path("/c")


def test_one_range_of_the_search_space_can_be_changed_alone():
    space = config.load(None, ["tuning.space.margin.high=3"], {}).tuning.space
    assert space["margin"] == config.FloatRange(type="float", low=0.1, high=3)
    assert space.keys() == config.DEFAULT_SPACE.keys()


@given(
    margin=st.floats(1e-6, 1e3),
    seed=st.integers(0, 2**31 - 1),
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    top_k=st.lists(st.integers(1, 10**6), min_size=1, max_size=5),
)
def test_effective_configuration_survives_the_round_trip(
    tmp_path_factory, margin, seed, name, top_k
):
    path = tmp_path_factory.mktemp("c") / "config.toml"
    loaded = config.with_values(
        config.Config(),
        training={"margin": margin, "retrieval_metric_top_k": top_k},
        logging={"wandb_project": name},
        global_={"seed": seed},
    )
    path.write_text(config.dump(loaded))
    assert config.load(path, (), {}) == loaded


def test_template_is_the_defaults_and_names_every_key(tmp_path):
    text = config.template()
    assert config.load(write(tmp_path, text), (), {}) == config.Config()
    for model in config.sections().values():
        for key in model.model_fields.keys() - {"space"}:
            assert f"\n{key} = " in text or f"\n# {key} =" in text


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_generated_file_is_up_to_date(path):
    assert path.read_text() == GENERATED[path](), "run `make reference`"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('tuning.space.learning_rat={type="float",low=1,high=2}', "did you mean 'learning_rate'"),
        ('tuning.space.num_epochs={type="int",low=1,high=2}', "not a key that can be tuned"),
        ("tuning.space.margin.low=-1", "-1.0 cannot be used"),
        ("tuning.space.margin.low=5", "low 5.0 is above high 1.0"),
        ("tuning.space.weight_decay.low=0", "needs low above 0"),
        ("tuning.space.hidden_dim.choices=[64, -1]", "-1 cannot be used"),
        ("tuning.storage_url=mysql://host/db", "postgresql://"),
        ("tuning.storage_url=postgresql://host/db?password=x", "PGPASSFILE"),
        ("tuning.study_name=a/b", "study_name"),
        ("tuning.direction=minimize", "recall@100 is to maximize"),
    ],
)
def test_a_study_that_cannot_work_is_refused_at_once(override, words):
    assert words in refused(overrides=[override]).message + str(refused(overrides=[override]).hint)
