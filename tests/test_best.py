"""The choice of the best trial, from a study or from W&B, and the configuration it leads to."""

import builtins
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import wandb
from optuna.trial import TrialState

from tests.wandb_stand_in import Run, serving
from tripletkit import config as configuration
from tripletkit.config import Config
from tripletkit.errors import ConfigError, StorageError
from tripletkit.tune.best import Best, comparison, final_config, from_study, from_wandb
from tripletkit.tune.claims import CAUSE
from tripletkit.tune.study import OBJECTIVE  # as the launcher writes it

KEY = "0123456789abcdef0123456789abcdef01234567"


# --- the study


@pytest.fixture
def study():
    return optuna.create_study(study_name="streetview", direction="maximize")


def add(study, values, state=TrialState.COMPLETE, cause=None, **params):
    """A trial that reported `values` from epoch 0 on and told the best of them."""
    best = (max if study.direction.name == "MAXIMIZE" else min)(values, default=None)
    study.add_trial(
        optuna.trial.create_trial(
            state=state,
            value=best if state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
            params=params,
            distributions={
                key: optuna.distributions.FloatDistribution(0, 1e4)
                if isinstance(value, float)
                else optuna.distributions.CategoricalDistribution([value])
                for key, value in params.items()
            },
            intermediate_values=dict(enumerate(values)),
            user_attrs={CAUSE: {"kind": "x", "message": cause}} if cause else {},
        )
    )


def test_the_best_complete_trial_with_its_parameters_and_epoch(study):
    add(study, [0.5, 0.7, 0.6], learning_rate=1e-3, hidden_dim=256)
    add(study, [0.5, 0.6, 0.8, 0.75], learning_rate=2e-3, hidden_dim=512)
    add(study, [0.5, 0.9], TrialState.PRUNED, learning_rate=3e-3, hidden_dim=512)
    assert from_study(study, "recall@100") == Best(
        source="study streetview, trial 1",
        number=1,
        metric="recall@100",
        value=0.8,
        epoch=2,
        params={"learning_rate": 2e-3, "hidden_dim": 512},
        name="streetview_00001",
    )


def test_a_loss_is_to_be_low():
    study = optuna.create_study(study_name="losses", direction="minimize")
    add(study, [0.9, 0.3])
    add(study, [0.9, 0.2, 0.4])
    best = from_study(study, "val_loss")
    assert (best.number, best.value, best.epoch) == (1, 0.2, 1)


def test_a_trial_can_be_named(study):
    add(study, [0.5])
    add(study, [0.9])
    assert from_study(study, "recall@100", 0).value == 0.5


def test_the_epoch_is_unknown_when_the_value_was_not_reported(study):
    study.add_trial(optuna.trial.create_trial(value=0.7))
    assert from_study(study, "recall@100").epoch is None


def test_a_study_without_a_complete_trial_says_what_its_trials_do(study):
    for state in ("RUNNING", "RUNNING", "WAITING", "PRUNED", "FAIL"):
        add(study, [0.5], TrialState[state])
    with pytest.raises(StorageError) as error:
        from_study(study, "recall@100")
    assert error.value.message == (
        "study streetview has no complete trial: 1 failed, 1 pruned, 2 running, 1 waiting"
    )
    assert "tripletkit status" in error.value.hint


def test_an_empty_study(study):
    with pytest.raises(StorageError, match="no complete trial: no trial at all"):
        from_study(study, "recall@100")


def test_a_named_trial_that_failed_says_why_and_what_there_is_instead(study):
    add(study, [0.5], TrialState.FAIL, cause="CUDA out of memory")
    add(study, [0.5])
    with pytest.raises(ConfigError) as error:
        from_study(study, "recall@100", 0)
    assert error.value.message == (
        "trial 0 of study streetview is failed, not complete: CUDA out of memory"
    )
    assert error.value.hint == "`tripletkit why 0` tells more; complete trials: 1"


@pytest.mark.parametrize("state", ["RUNNING", "WAITING", "PRUNED"])
def test_a_named_trial_must_be_complete(study, state):
    add(study, [0.5], TrialState[state])
    with pytest.raises(ConfigError, match=f"trial 0 .* is {state.lower()}, not complete") as error:
        from_study(study, "recall@100", 0)
    assert error.value.hint == "no trial is complete yet"


def test_a_named_trial_that_does_not_exist(study):
    add(study, [0.5])
    with pytest.raises(ConfigError, match="has no trial 7") as error:
        from_study(study, "recall@100", 7)
    assert error.value.hint == "complete trials: 0"


def test_a_study_that_judged_by_something_else(study):
    study.set_user_attr(OBJECTIVE, "map@r")
    add(study, [0.5])
    with pytest.raises(ConfigError, match=r"judged its trials by map@r, .* is recall@100") as error:
        from_study(study, "recall@100")
    assert "tuning.objective=map@r" in error.value.hint
    assert from_study(study, "map@r").value == 0.5


def test_it_can_be_kept_in_a_json_file(study):
    add(study, [0.5, 0.7], learning_rate=1e-3, hidden_dim=256, activation="gelu")
    best = from_study(study, "recall@100")
    assert Best(**json.loads(json.dumps(best._asdict()))) == best


# --- Weights & Biases


@pytest.fixture
def client(monkeypatch, tmp_path):
    """The real client, with nothing of this machine's: no key, no settings, no folder."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "NETRC", "TMPDIR", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "TMPDIR").mkdir()
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


@pytest.fixture
def served(client):
    """Runs in project lab/street -> the server that holds them; the client is logged in there."""
    with contextlib.ExitStack() as stack:

        def serve(*runs, **options):
            server = stack.enter_context(serving({"street": list(runs)}, key=KEY, **options))
            client.setenv("WANDB_BASE_URL", server.url)
            client.setenv("WANDB_API_KEY", KEY)
            return server

        yield serve


def config_of(project="street", metric="recall@100", pattern="trial_*", **sections):
    return configuration.with_values(
        Config(),
        **{
            "logging": {"wandb_project": project},
            "training": {
                "best_training_metric_name": metric,
                "best_training_trial_name_pattern": pattern,
            },
            **sections,
        },
    )


def run(name, *values, metric="recall@100", **options):
    """A run as our tracker logs it: a row per epoch from the untrained head on, and the config."""
    history = [{"epoch": i, metric: v, "band_share/0": 0.5} for i, v in enumerate(values)]
    tuned = options.pop("config", None) or configuration.describe(Config())
    return Run(name, config=tuned, history=tuple(history), **options)


def described(**sections):
    return configuration.describe(configuration.with_values(Config(), **sections))


def test_the_run_whose_history_peaked_highest_wins(served):
    server = served(
        run("trial_00000", 0.5, 0.8, 0.7),
        run(
            "trial_00012",
            0.5,
            0.9,
            0.6,  # what the summary says
            config=described(training={"learning_rate": 3e-3}, training_model={"hidden_dim": 1024}),
        ),
        run("trial_00002", 0.5, "NaN"),
        run("baseline", 0.99),
    )
    assert from_wandb(config_of()) == Best(
        source="W&B lab/street run trial_00012",
        number=12,
        metric="recall@100",
        value=0.9,
        epoch=1,
        params={
            "learning_rate": 3e-3,
            "weight_decay": 1e-5,
            "margin": 0.5,
            "hidden_dim": 1024,
            "dropout": 0.1,
        },
        name="trial_00012_id-trial_00012",
    )
    assert server.asked.count("Runs") == 1
    assert server.asked.count("RunSampledHistory") == 3


@pytest.mark.parametrize("metric", ["val_loss", "train_loss"])
def test_a_loss_in_wandb_is_to_be_low(served, metric):
    served(run("trial_0", 0.9, 0.2, metric=metric), run("trial_1", 0.5, 0.4, metric=metric))
    best = from_wandb(config_of(metric=metric))
    assert (best.number, best.value, best.epoch) == (0, 0.2, 1)


def test_all_pages_are_read(served):
    server = served(*[run(f"trial_{i}", i / 10) for i in range(7)], page=2)
    assert from_wandb(config_of()).number == 6
    assert server.asked.count("Runs") == 4


def test_the_project_may_name_its_entity(served):
    served(run("trial_0", 0.9))
    assert from_wandb(config_of("lab/street")).value == 0.9


def test_only_finished_runs_count_and_the_others_are_mentioned(served, caplog):
    served(
        run("trial_0", 0.5),
        run("trial_1", 0.9, state="crashed"),
        run("trial_2", 0.9, state="running"),
        run("trial_3", 0.9, state="running"),
    )
    assert from_wandb(config_of()).number == 0
    assert "1 finished runs are called 'trial_*'; left out: 1 crashed, 2 running" in caplog.text


def test_a_value_in_the_summary_alone_counts_too(served):
    served(run("trial_0", 0.5), Run("trial_1", described(), summary={"recall@100": 0.7}))
    best = from_wandb(config_of())
    assert (best.number, best.value, best.epoch) == (1, 0.7, None)


def test_the_space_says_which_parameters_are_taken(served, caplog):
    served(run("trial_0", 0.5, config=described(training={"margin": 0.3, "batch_size": 512})))
    space = {"margin": {"type": "float", "low": 0.1, "high": 1.0}}
    best = from_wandb(config_of(tuning={"space": space}))
    assert best.params == {"margin": 0.3}
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "training.batch_size = 512 (yours: 256)" in warning
    assert "margin" not in warning
    assert "num_epochs" not in warning


def test_an_empty_space_takes_all_that_shapes_the_head(served):
    trained = described(
        training={"batch_size": 512, "num_epochs": 3, "sample_fraction": 0.5},
        training_model={"input_dim": 8, "num_hidden_layers": 2},
    )
    served(run("trial_0", 0.5, config=trained))
    params = from_wandb(config_of(tuning={"space": {}})).params
    assert (params["batch_size"], params["num_hidden_layers"]) == (512, 2)
    assert not {"num_epochs", "sample_fraction", "input_dim"} & set(params)


def test_parameters_at_the_top_level_of_a_run_and_absent_ones(served, caplog):
    served(run("trial_0", 0.5, config={"learning_rate": 0.02, "training": "a title"}))
    assert from_wandb(config_of()).params == {"learning_rate": 0.02}
    assert "does not record weight_decay, margin, hidden_dim, dropout" in caplog.text


def test_a_run_without_any_parameter_is_refused(served):
    served(run("trial_0", 0.5, config={"color": "red"}))
    with pytest.raises(ConfigError, match="W&B lab/street run trial_0 has none of learning_rate"):
        from_wandb(config_of())


def test_no_such_project(served):
    served(run("trial_0", 0.5))
    for project in ("streets", "other/street"):
        with pytest.raises(ConfigError, match=r"there is no W&B project .*/street") as error:
            from_wandb(config_of(project))
        assert "logging.wandb_project" in error.value.hint


def test_no_run_of_that_name_shows_three_that_exist(served):
    served(*[run(f"sweep-{i}", 0.5) for i in range(9)])
    with pytest.raises(ConfigError) as error:
        from_wandb(config_of())
    assert error.value.message == (
        "no run of W&B lab/street is called 'trial_*'; "
        "it has, for example, sweep-0, sweep-1, sweep-2"
    )
    assert "best_training_trial_name_pattern" in error.value.hint


def test_a_project_without_runs(served):
    served()
    with pytest.raises(ConfigError, match="it has no runs at all"):
        from_wandb(config_of())


def test_no_run_is_finished(served):
    served(run("trial_0", 0.5, state="running"), run("trial_1", state="failed"))
    with pytest.raises(StorageError, match="is finished: 1 failed, 1 running"):
        from_wandb(config_of())


def test_a_metric_that_no_run_has_lists_those_there_are(served):
    served(run("trial_0", 0.5, metric="map@r"), run("trial_1", 0.5, metric="map@r"))
    with pytest.raises(ConfigError, match="has the metric 'recall@100'") as error:
        from_wandb(config_of())
    assert error.value.hint == "set training.best_training_metric_name to one of map@r"


def test_a_query_that_the_server_refuses_is_one_sentence(served, monkeypatch):
    served(run("trial_0", 0.5))
    monkeypatch.setattr("tests.wandb_stand_in._sampled", refuse)
    with pytest.raises(StorageError, match=r"^Weights & Biases: .*not in the stand-in: history$"):
        from_wandb(config_of())


def refuse(*args, **kwargs):
    raise NotImplementedError("history")


def test_a_wrong_key_is_refused_and_not_repeated(served, client):
    served(run("trial_0", 0.5))
    client.setenv("WANDB_API_KEY", wrong := "f" * 40)
    with pytest.raises(ConfigError) as error:
        from_wandb(config_of())
    assert error.value.message == "Weights & Biases knows no API key of yours, or refuses it"
    assert "wandb login" in error.value.hint
    assert wrong not in f"{error.value.message}{error.value.hint}{error.value.__cause__}"


@pytest.mark.parametrize("key", [None, "not a key!"])
def test_no_key_and_one_that_cannot_be(served, client, key):
    served(run("trial_0", 0.5))
    client.delenv("WANDB_API_KEY")
    if key:
        client.setenv("WANDB_API_KEY", key)
    with pytest.raises(ConfigError, match="knows no API key of yours, or refuses it") as error:
        from_wandb(config_of())
    assert not key or key not in str(error.value.__cause__)


def test_no_network(client):
    """In a process of its own, because it is to end, too: the client's service may get stuck."""
    program = (
        "from tripletkit.config import Config; from tripletkit.errors import StorageError\n"
        "from tripletkit.tune.best import from_wandb\n"
        "try: from_wandb(Config())\n"
        "except StorageError as error: print(error.message, error.hint, sep='; ')"
    )
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        client.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        client.setenv("WANDB_API_KEY", KEY)
        client.setenv("WANDB_HTTP_TIMEOUT", "1")
        client.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
        )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout.startswith("Weights & Biases does not answer; check the network")


def test_without_the_package_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match="wandb is not installed") as error:
        from_wandb(config_of())
    assert error.value.hint == "pip install 'tripletkit[wandb]'"


def test_nothing_is_left_in_the_current_folder(served, tmp_path):
    served(run("trial_0", 0.5))
    from_wandb(config_of())
    assert not list(tmp_path.glob("wandb*"))


# --- the final training

BEST = Best("study streetview, trial 12", 12, "recall@100", 0.8312, 14, {}, "streetview_00012")


def test_the_parameters_find_their_sections():
    best = BEST._replace(params={"learning_rate": 3e-3, "hidden_dim": 1024, "dropout": 0.2})
    final = final_config(Config(), best)
    assert final.training.learning_rate == 3e-3
    assert (final.training_model.hidden_dim, final.training_model.dropout) == (1024, 0.2)


def test_subsampling_is_dropped_and_all_epochs_are_trained():
    sampled = configuration.with_values(
        Config(),
        training={
            "sample_fraction": 0.1,
            "sample_buildings": 50,
            "val_sample_fraction": 0.2,
            "val_sample_buildings": 30,
            "num_epochs": 80,
            "resume_from_checkpoint": "none",
        },
        tuning={"max_epochs": 3},
    )
    training = final_config(sampled, BEST).training
    assert (training.sample_fraction, training.sample_buildings) == (1.0, 0)
    assert (training.val_sample_fraction, training.val_sample_buildings) == (1.0, 0)
    assert training.num_epochs == 80
    assert training.resume_from_checkpoint == "auto"


@pytest.mark.parametrize(("configured", "used"), [(0, 10), (3, 3), (25, 25)])
def test_it_always_stops_early(configured, used):
    config = configuration.with_values(Config(), training={"early_stopping_patience": configured})
    assert final_config(config, BEST).training.early_stopping_patience == used


@pytest.mark.parametrize(
    ("metric", "monitor", "top_k"),
    [
        ("recall@100", "recall@100", [1, 5]),
        ("recall@5", "recall@5", [1, 5]),
        ("map@r", "map@r", [1, 5]),
        ("val_loss", "val_loss", [1, 5]),
        ("train_loss", "recall@20", [1, 5]),  # W&B may rank by it; then the objective counts
    ],
)
def test_it_monitors_what_the_trial_was_chosen_by(metric, monitor, top_k):
    config = configuration.with_values(
        Config(),
        training={"retrieval_metric_top_k": top_k},
        tuning={"objective": "recall@20"},
    )
    training = final_config(config, BEST._replace(metric=metric)).training
    assert training.monitor == monitor
    added = {int(monitor[7:])} if monitor.startswith("recall@") else set()
    assert training.retrieval_metric_top_k == sorted({*top_k, *added})


def test_it_has_a_folder_of_its_own(tmp_path):
    config = configuration.with_values(
        Config(),
        global_={"scratch_dir": tmp_path},
        paths={"checkpoint_dir": "runs"},
    )
    own = final_config(config, BEST).checkpoint_dir
    assert own == tmp_path / "runs" / "best_streetview_00012"
    named = final_config(config, BEST, folder=Path("elsewhere")).checkpoint_dir
    assert named == Path.cwd() / "elsewhere"


def test_the_wandb_run_is_called_after_the_trial_and_is_none_itself():
    off = configuration.with_values(Config(), logging={"wandb_run_name": "mine"})
    assert final_config(off, BEST).logging.wandb_run_name == "mine"
    on = configuration.with_values(off, logging={"wandb_enabled": True})
    assert final_config(on, BEST).logging.wandb_run_name == "best_streetview_00012"


def test_the_rest_of_the_configuration_stays():
    config = configuration.with_values(
        Config(), global_={"seed": 7}, training={"batch_size": 64}, slurm={"account": "def-lab"}
    )
    final = final_config(config, BEST)
    assert (final.global_, final.slurm, final.tuning) == (
        config.global_,
        config.slurm,
        config.tuning,
    )
    assert final.training.batch_size == 64
    assert final_config(final, BEST, folder=final.checkpoint_dir) == final


@pytest.mark.parametrize("key", ["lerning_rate", "num_epochs", "input_dim"])
def test_a_parameter_that_cannot_be_tuned_is_refused(key):
    with pytest.raises(ConfigError, match=f"study streetview, trial 12 has a parameter '{key}'"):
        final_config(Config(), BEST._replace(params={key: 1}))


def test_a_value_that_cannot_be_used_is_refused():
    with pytest.raises(ConfigError, match="dropout"):
        final_config(Config(), BEST._replace(params={"dropout": 1.5}))


# --- the comparison


def test_the_two_values_side_by_side():
    assert comparison(BEST, {"recall@100": 0.8533}, 37) == (
        "recall@100: trial 12 0.8312 (epoch 14) -> final 0.8533 (epoch 37)"
    )
    unnumbered = BEST._replace(number=None, epoch=None, name="old_run_x1")
    assert comparison(unnumbered, {"recall@100": 0.8533}) == (
        "recall@100: old_run_x1 0.8312 -> final 0.8533"
    )


@pytest.mark.parametrize(
    ("metric", "trial", "final", "warned"),
    [
        ("recall@100", 0.8, 0.793, False),
        ("recall@100", 0.8, 0.791, True),
        ("recall@100", 0.8, 0.95, False),
        ("val_loss", 0.2, 0.2019, False),
        ("val_loss", 0.2, 0.2021, True),
        ("val_loss", 0.2, 0.1, False),
        ("val_loss", 0.0, 0.1, True),
    ],
)
def test_a_final_value_that_is_worse_by_more_than_noise_is_a_warning(metric, trial, final, warned):
    text = comparison(BEST._replace(metric=metric, value=trial), {metric: final}, 3)
    assert ("warning: the final training is worse" in text) == warned


def test_a_metric_that_the_final_training_does_not_have():
    assert comparison(BEST, {}).endswith("-> final not computed")
