"""A study that is prepared again: what may change, where its trials are, how it is seeded."""

from pathlib import Path

import pytest

from tests.test_tune_worker import config, files, me, prepare, trials_of  # noqa: F401 - fixtures
from tripletkit import config as configuration
from tripletkit import stages
from tripletkit.config import Config, FloatRange
from tripletkit.errors import ConfigError
from tripletkit.paths import StudyPaths
from tripletkit.tune import claims, space, storage, study

MARGIN = {"type": "float", "low": 0.1, "high": 1.0}


def changed(config: Config, **sections) -> Config:  # noqa: F811
    return configuration.with_values(config, **sections)


def spaced(config: Config, **space) -> Config:  # noqa: F811
    """With other ranges; None takes a key out."""
    ranges = {k: r.model_dump() for k, r in config.tuning.space.items()} | space
    return changed(config, tuning={"space": {k: r for k, r in ranges.items() if r is not None}})


def begin(config: Config) -> claims.Claim:  # noqa: F811
    """What a worker does before it trains."""
    claim = claims.claim(
        storage.open_study(config.tuning, seed=0, workers=1), me(), 9, lambda _: {}
    )
    assert claim is not None
    space.suggest(claim.trial, config.tuning.space)
    return claim


@pytest.fixture
def unfinished(config) -> Config:  # noqa: F811
    """A study whose first trial waits for a worker."""
    prepare(config)
    begin(config).release()
    return config


@pytest.fixture
def finished(config) -> Config:  # noqa: F811
    shared = prepare(config)
    shared.study.tell(begin(config).trial, 0.5)
    return config


CHANGES = [
    (lambda c: spaced(c, margin=None), "training.margin was tuned (low 0.1, high 1.0, log False), is 0.5"),
    (lambda c: spaced(c, dropout={**MARGIN, "high": 0.2}),
     "training_model.dropout was 0.1, is tuned (low 0.1, high 0.2, log False)"),
    (lambda c: spaced(c, precision={"type": "categorical", "choices": ["fp32"]}),
     "training.precision was auto, is tuned (choices ['fp32'])"),
    (lambda c: changed(c, training={"batch_size": 32}), "training.batch_size was 16, is 32"),
    (lambda c: changed(c, training={"sample_buildings": 30}), "training.sample_buildings was 0, is 30"),
    (lambda c: changed(c, tuning={"max_epochs": 5}), "tuning.max_epochs was 4, is 5"),
    (lambda c: changed(c, global_={"seed": 1}), "global.seed was 42, is 1"),
    (lambda c: changed(c, paths={"difficulty_metadata_path": "/bands"}),
     "paths.difficulty_metadata_path was not set, is /bands"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), CHANGES, ids=[t.partition(" ")[0] for _, t in CHANGES])
def test_what_an_unfinished_trial_began_with_cannot_change(unfinished, change, told):
    paths = stages.study_paths(unfinished)
    before = paths.config.read_bytes()
    with pytest.raises(ConfigError) as refused:
        prepare(change(unfinished))
    assert refused.value.message.endswith(f"would not go on as they began: {told}")
    assert f"tune --config {paths.config}" in refused.value.hint
    assert "--study-name" in refused.value.hint
    assert paths.config.read_bytes() == before
    prepare(configuration.load(paths.config, environ={}))  # the way out


def test_all_that_differs_is_named(unfinished):
    other = changed(unfinished, training={"batch_size": 32, "init": "pca"})
    with pytest.raises(ConfigError, match=r"batch_size was 16, is 32; training\.init was lda, is"):
        prepare(other)


@pytest.mark.parametrize(("change", "told"), CHANGES, ids=[t.partition(" ")[0] for _, t in CHANGES])
def test_with_finished_trials_alone_it_is_a_warning(finished, change, told, caplog):
    caplog.clear()
    prepare(change(finished))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.endswith(told)


def test_a_range_may_change_while_a_trial_waits(unfinished, caplog):
    """The trial keeps its value, also outside of the new range."""
    (waiting,) = trials_of(prepare(unfinished))
    narrow = spaced(unfinished, margin={**MARGIN, "low": 0.01, "high": 0.02})
    shared = prepare(narrow)
    assert "margin was tuned (low 0.1, high 1.0, log False), is tuned (low 0.01" in caplog.text
    shared.study.tell(begin(narrow).trial, 0.5)
    begin(narrow)
    first, second = trials_of(shared)
    assert first.params == waiting.params
    assert second.params["margin"] <= 0.02


def test_what_does_not_shape_a_trial_is_free_to_change(unfinished, tmp_path, caplog):
    caplog.clear()
    other = changed(
        unfinished,
        global_={"log_dir": tmp_path / "elsewhere"},
        tuning={"workers": 3, "n_trials": 5, "pruner": "median"},
        slurm={"mem": "1G"},
        logging={"tensorboard": True},
        training={"checkpoint_every_minutes": 5},
    )
    prepare(other)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_before_there_are_trials_anything_may_change(config, caplog):  # noqa: F811
    prepare(config)
    prepare(spaced(changed(config, training={"batch_size": 32}), margin=None))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_parameter_cannot_change_its_kind(finished):
    """Optuna would refuse the new trials."""
    with pytest.raises(ConfigError, match="has trials with another choices"):
        prepare(spaced(finished, margin={"type": "categorical", "choices": [0.1, 0.2]}))


def test_a_trial_that_goes_on_keeps_what_the_space_no_longer_names(unfinished):
    (waiting,) = trials_of(prepare(unfinished))
    trial = begin(unfinished).trial
    assert space.suggest(trial, {}) == waiting.params
    wider = space.suggest(trial, {"dropout": FloatRange(**{**MARGIN, "high": 0.2})})
    assert wider.keys() - waiting.params.keys() == {"dropout"}


def test_from_another_folder_a_study_with_trials_is_refused(unfinished, tmp_path):
    here = stages.study_paths(unfinished).root
    other = changed(unfinished, tuning={"output_dir": tmp_path / "other"})
    with pytest.raises(ConfigError) as refused:
        prepare(other)
    assert f"has its trials in {here}, not in {tmp_path / 'other' / here.name}" in str(
        refused.value
    )
    assert f"--set tuning.output_dir={here.parent}" in refused.value.hint
    assert not (tmp_path / "other").exists()
    # moved there, it is the study's folder
    here.parent.rename(tmp_path / "other")
    shared = prepare(other)
    with pytest.raises(ConfigError, match=f"in {tmp_path / 'other'}"):
        prepare(unfinished)
    assert shared.study.user_attrs[study.FOLDER] == str(tmp_path / "other" / here.name)


def test_a_study_without_trials_may_be_prepared_elsewhere(config, tmp_path):  # noqa: F811
    first = prepare(config)
    other = changed(config, tuning={"output_dir": tmp_path / "other"})
    second = prepare(other)
    assert second.study.user_attrs[study.ID] == first.study.user_attrs[study.ID]
    assert second.study.user_attrs[study.FOLDER] == str(stages.study_paths(other).root)


def test_a_folder_is_the_same_by_any_name(unfinished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = study.prepare(unfinished, StudyPaths(Path("trials/tripletkit")))
    assert shared.study.user_attrs[study.FOLDER] == str(stages.study_paths(unfinished).root)


def parameters(config: Config, *totals: int) -> list[tuple]:  # noqa: F811
    """Of the trials after `tune` in the foreground with each total."""
    for total in totals:
        shared = prepare(changed(config, tuning={"n_trials": total}))
        stages.tune(
            configuration.load(stages.study_paths(config).config, environ={}), lambda: False
        )
    return [tuple(trial.params.values()) for trial in trials_of(shared)]


def test_a_continued_study_proposes_new_parameters_and_the_same_each_time(config, tmp_path):  # noqa: F811
    config = changed(config, tuning={"max_epochs": 1})
    found = parameters(config, 1, 2)
    assert len(set(found)) == 2
    again = changed(
        config, tuning={"storage_path": tmp_path / "again.db", "output_dir": tmp_path / "again"}
    )
    assert parameters(again, 1, 2) == found
