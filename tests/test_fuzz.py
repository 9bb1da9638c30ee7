"""Bad input: whatever it is, we take it or refuse it with an error of ours, and never run it.

tests/fuzz holds what is fuzzed; `python -m tests.fuzz` does so for longer. Here are a bounded number
of inputs for each, always the same, and those that once made trouble, by name.
"""

import io
import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import toy
from tests.fuzz import engine
from tests.fuzz.draw import mutated
from tests.fuzz.judge import CANARY, Surprise, judge
from tests.fuzz.targets import caches, checkpoints, scheduler, tables
from tripletkit import cli, config
from tripletkit.cluster import queue
from tripletkit.cluster.resources import gpus, parameters
from tripletkit.config import Config
from tripletkit.data import bands, damage, parquet, split, store
from tripletkit.errors import ConfigError, DataError
from tripletkit.monitor.logs import Tail
from tripletkit.train import checkpoint
from tripletkit.tune import attempts, postgresql

IN_THIS_PROCESS = (
    "toml",
    "settings",
    "limits",
    "dsn",
    "webhook",
    "slurm",
    "log",
    "records",
    "state",
)

# --- the judge -------------------------------------------------------------------------------


def test_every_kind_of_fault_is_seen(tmp_path, capsys):
    (tmp_path / "faulty-old.json").write_text('{"place": "mended long ago"}')
    tally = engine.fuzz("faulty", seconds=0, runs=16, seed=0, engine="plain", keep=tmp_path)
    assert {place.partition(" at ")[0] for place in tally.surprises} == {
        "the input ran as code", "KeyError", "MemoryError",
    }  # fmt: skip
    assert tally.surprised >= 3
    refused = tally.tried - tally.taken - tally.surprised - len(tally.crashes)
    assert f"{refused} refused, 3 surprises" in str(tally)
    assert [crash.partition(":")[0] for crash in tally.crashes][:1] == ["SIGSEGV"]
    file = Path(tally.crashes[0].partition(": ")[2])
    assert file.read_bytes() == b"crash"


def test_an_input_that_takes_for_ever_is_seen(monkeypatch):
    monkeypatch.setattr("tests.fuzz.judge.SECONDS", 0.3)
    with pytest.raises(Surprise, match="TooSlow"):
        judge(engine.find("faulty"), b"slow")


# --- any input -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_any_input_is_taken_or_refused(name, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time, else
    target = engine.find(name)
    seeds = target.seeds()

    @settings(deadline=None, max_examples=20, derandomize=True, database=None)
    @given(
        seed=st.sampled_from(range(len(seeds))),
        changes=st.integers(0, 2**32),
        data=st.binary(max_size=60),
    )
    def holds(seed: int, changes: int, data: bytes) -> None:
        judge(target, mutated(seeds[seed], random.Random(changes), target.words))
        judge(target, data)

    holds()


@pytest.mark.parametrize(
    ("name", "runs"), [("parquet", 40), ("schema", 40), ("cache", 40), ("checkpoint", 40)]
)
def test_files_that_may_crash_the_interpreter(name, runs, tmp_path):
    """In a process of their own."""
    tally = engine.fuzz(name, seconds=0, runs=runs, seed=1, engine="plain", keep=tmp_path)
    assert not tally.surprises
    assert not tally.crashes
    assert tally.tried >= runs


# --- what made trouble: configuration --------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("margin = " + "[" * 3000, "nested too deeply"),
        ("num_epochs = " + "9" * 5000, "not valid TOML"),
        ("num_epochs = 0x" + "f" * 6000, "beyond 64 bits"),
        ("num_epochs = 9223372036854775808", "beyond 64 bits"),
        ('resume_from_checkpoint = "a\\u0000b"', "NUL"),
        ("device = '" + "x" * 5000 + "'", "..."),
    ],
)  # fmt: skip
def test_values_that_no_file_or_library_holds_are_refused(text, words, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(f"[training]\n{text}\n")
    with pytest.raises(ConfigError) as error:
        config.load(file, environ={})
    assert words in error.value.message
    assert len(error.value.message) < 1000


def test_names_of_files_that_are_no_text_are_refused_at_once_and_not_when_they_are_written_down():
    with pytest.raises(ConfigError, match=r"CACHE_DIR.*not UTF-8"):
        config.load(environ={"TRIPLET_TRAINING_CACHE_DIR": "a\udcff"})


@pytest.mark.parametrize("key", ["space.margin.low.x", "space.margin.low.x.y"])
def test_a_bound_is_no_table(key):
    with pytest.raises(ConfigError, match=r"--set tuning.space.margin.*'low' is a value"):
        config.load(overrides=[f"tuning.{key}=1"], environ={})


@pytest.mark.parametrize(
    "values",
    [{"hidden_dim": 10**18}, {"hidden_dim_multiplier": 1e300, "num_hidden_layers": 3}, {"output_dim": 2**40}],
)  # fmt: skip
def test_a_head_that_no_machine_holds(values):
    with pytest.raises(ConfigError, match="wider than 16,777,216"):
        config.with_values(Config(), training_model=values)


def test_sizes_and_times_beyond_what_slurm_counts():
    for values in ({"time": "9" * 400}, {"mem": "9" * 400}, {"time": "٣"}, {"mem": "٣G"}):
        with pytest.raises(ConfigError):
            parameters(Config(slurm=values).slurm)
    assert gpus(Config(slurm={"gres": "gpu:" + "9" * 5000}).slurm) == 0  # sbatch will refuse it


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql:\\\\u:{SECRET}@h/d", f"postgresql://u:{SECRET}/x@h/d", f"postgresql://u:{SECRET}?x@h/d",
        f"postgresql://u:{SECRET}#x@h/d", f"postgresql://h/d;password={SECRET}", "postgresql://h\ud800/d", "postgresql://h/\0",
    ],
)  # fmt: skip
def test_addresses_that_hide_a_password_or_are_no_text(url):
    with pytest.raises(ConfigError) as error:
        config.with_values(Config(), tuning={"storage_url": url})
    assert SECRET not in error.value.message


@pytest.mark.parametrize("typed", ["?pasword=", "pass%7ord=", "?pass%7ord="])
def test_a_misspelt_option_may_hold_a_password_too(typed):
    url = f"postgresql://h/d{typed}{SECRET}"
    tuning = config.with_values(Config(), tuning={"storage_url": url}).tuning
    with pytest.raises(ConfigError, match=r"ord=\*\*\*: ") as error:
        postgresql.is_private(tuning)
    assert SECRET not in error.value.message


def test_several_hosts_and_ports_are_an_address():
    url = "postgresql://user@h1:5432,h2:5433/d?target_session_attrs=read-write"
    assert config.with_values(Config(), tuning={"storage_url": url}).tuning.storage_url == url


# --- what made trouble: Slurm, logs and records -----------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "|12_[0-99999999999]|PENDING|0:0|||||||||\n", "|12_[a-b]|PENDING|0:0|||||||||\n", "1.2.3M|12.0|x|||||||||||\n",
        "9" * 400 + "K|12|COMPLETED|0:0|||||||||\n", "5M|12.batch|COMPLETED|0:0|n||||||||batch\n",
    ],
)  # fmt: skip
def test_an_accounting_that_makes_no_sense(said, monkeypatch):
    monkeypatch.setattr(
        queue, "_call", lambda *_: scheduler.subprocess.CompletedProcess([], 0, said, "")
    )
    assert all(run.max_rss is None and len(run.id) < 40 for run in queue.past(["12"]))


def test_partitions_without_a_name_or_a_limit_are_left_out(monkeypatch):
    said = "JobId=12 State=UP\nPartitionName=a MaxTime=1:00 Default=YES\nPartitionName=b\n"
    monkeypatch.setattr(
        queue, "_call", lambda *_: scheduler.subprocess.CompletedProcess([], 0, said, "")
    )
    assert [each["PartitionName"] for each in queue.partitions()] == ["a"]


def test_a_line_without_an_end_is_shown_in_parts_and_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tripletkit.monitor.logs.LONG_LINE", 1000)
    monkeypatch.setattr("tripletkit.monitor.logs.SEARCHED", 4096)
    monkeypatch.setattr("tripletkit.monitor.logs.BLOCK", 512)
    path = tmp_path / "x.err"
    path.write_bytes(b"50%\r" * 5000)  # as a progress bar
    tail = Tail(path)
    tail.skip_to_last(1)
    assert len(tail.read()) <= 8192
    with path.open("ab") as file:
        file.write(b"60%\r" * 10)
    assert tail.read() == ""
    assert tail.read(to_the_end=True) == "60%\r" * 10


def test_more_lines_than_there_are(tmp_path):
    path = tmp_path / "x.err"
    path.write_text("a\nb\n")
    tail = Tail(path)
    tail.skip_to_last(10**12)
    assert tail.read() == "a\nb\n"


GOOD = {"job": "12", "started": "2026-01-02T03:04:05Z", "from_epoch": 0}


@pytest.mark.parametrize(
    "line",
    ["3", "null", "[" * 100_000, "9" * 5000, "{}", '{"job": 12}', "\0"]
    + [json.dumps({**GOOD, key: value}) for key, value in (
        ("started", "soon"), ("ended", 3), ("ended", "x"), ("from_epoch", "1"), ("gpus", "two"), ("saved", 1e300), ("job", None),
        ("outcome", ["complete"]), ("outcome", "complete"), ("started", None),
    )],
    ids=lambda line: line[:30],
)  # fmt: skip
def test_a_line_that_is_no_attempt_is_left_out(line, tmp_path, caplog):
    path = tmp_path / "attempts.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    assert attempts.read(path) == [GOOD]
    assert "line 2 is no record of an attempt" in caplog.text
    assert attempts.killed_in_a_row(path) == 1


@pytest.mark.parametrize("damage", ["", '{"job": "12", "star'])
def test_how_it_ended_is_not_noted_of_another_attempt(damage, tmp_path, caplog):
    path = tmp_path / "attempts.jsonl"
    before = f"{json.dumps(GOOD)}\n{damage}\n" if damage else ""
    path.write_text(before)
    attempts.end(path, "complete")
    assert path.read_text() == before
    assert "how its attempt ended is not noted" in caplog.text


# --- what made trouble: parquet and caches ----------------------------------------------------


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "train.parquet"


@pytest.mark.parametrize("name", ["building_id", "embedding", "streetview_image_id"])
def test_a_column_that_is_there_twice_is_refused(name, path, tmp_path):
    table = toy.table(buildings=3)
    pq.write_table(pa.table([*table.columns, table[name]], [*table.column_names, name]), path)
    for look in (
        lambda: store.open_store(path, tmp_path / "cache"),
        lambda: split.split_parquet(path, tmp_path / "out", fractions={"a": 0.5, "b": 0.5}, seed=1)
        if name == "building_id" else store.open_store(path, tmp_path / "cache"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=f"2 columns '{name}'"):
            look()


def test_ids_that_are_no_text_are_refused(path, tmp_path):
    table = toy.table(buildings=3)
    raw = pa.array([b"\x94\xff%d" % (i // 4) for i in range(len(table))], pa.binary())
    ids = pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:])
    pq.write_table(table.set_column(1, "building_id", ids), path)
    with pytest.raises(DataError, match=r"train.parquet: .*UTF8"):
        store.open_store(path, tmp_path / "cache")


def test_a_footer_that_counts_other_rows_than_there_are_is_refused(path, monkeypatch):
    toy.write_parquet(path, buildings=3)
    table = parquet.open_table([path], ["building_id"])
    wrong = parquet.Table(table.files, (table.total + 1,))
    with pytest.raises(DataError, match="says that it has 13 rows, and has 12"):
        list(parquet.batches(wrong, ["building_id"]))


def test_a_column_that_pyarrow_cannot_copy_is_refused(path, tmp_path, monkeypatch):
    table = toy.table(buildings=3)
    pq.write_table(
        table.append_column("note", pa.array(["x"] * len(table), pa.string_view())), path
    )
    try:
        split.split_parquet(path, tmp_path / "out", fractions={"a": 0.5, "b": 0.5}, seed=1)
    except DataError as error:  # a later pyarrow may copy it
        assert "pyarrow cannot use it" in error.message  # noqa: PT017
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("file", ["building.i32", "by_building.i64", "starts.i64", "images.arrow", "buildings.arrow",
                                  "neighbors.i32", "offsets.i64"])  # fmt: skip
@pytest.mark.parametrize("with_", [b"\0", b"\xff", b"\x7f"])
def test_a_cache_of_the_right_sizes_with_other_numbers_is_built_again(
    file, with_, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    opened, found = _open(tmp_path)
    (target,) = (tmp_path / "cache").glob(f"*/{file}")
    before = target.read_bytes()
    target.write_bytes(with_ * len(before))
    opened, found = _open(tmp_path)
    caches.use(opened, found)
    assert target.read_bytes() == before or file == "neighbors.i32"  # zeros are buildings, too


def _open(cache: Path) -> tuple[store.Store, bands.Bands]:
    opened = store.open_store(caches.good() / "t.parquet", cache / "cache")
    return opened, bands.open_bands(caches.good() / "m.parquet", opened, cache / "cache")


@pytest.mark.parametrize(
    "facts",
    ["[" * 100_000, "{}", '{"files": {}}', '{"files": {}, "rows": 15, "dim": -4, "dtype": "f16"}',
     '{"files": {}, "rows": 15, "dim": 4, "dtype": "../f16"}', '{"files": {}, "rows": 15, "dim": 4e300, "dtype": "f16"}'],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_foreign_facts_of_a_cache(facts, tmp_path):
    opened, _ = _open(tmp_path)
    (opened.folder / "meta.json").write_text(facts)
    again, found = _open(tmp_path)
    caches.use(again, found)
    assert np.array_equal(again.embeddings, opened.embeddings)


def test_groups_are_as_a_store_has_them_or_not():
    building = np.array([0, 1, 0, 1], np.int32)
    good = {
        "building": building,
        "by_building": np.array([0, 2, 1, 3]),
        "starts": np.array([0, 2, 4]),
    }
    damage.check_groups(**good)
    for key, wrong in (
        ("by_building", [0, 1, 2, 3]), ("by_building", [0, 0, 1, 3]), ("by_building", [0, 2, 1, 4]), ("by_building", [0, 2, 1, -1]),
        ("starts", [0, 5, 4]), ("starts", [0, 2, 5]), ("starts", [1, 2, 4]), ("building", [0, 1, 0, 9]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"building|place"):
            damage.check_groups(**{**good, key: np.array(wrong, good[key].dtype)})


# --- what made trouble: checkpoints -----------------------------------------------------------


@pytest.mark.parametrize("how", ["as a whole", "as a value", "in the zip"])
def test_a_checkpoint_that_runs_code_is_not_loaded(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb = checkpoints.Bomb(eval, f"open({CANARY!r}, 'w').close()")
    content = pickle.dumps(bomb if how == "as a whole" else {"model_state_dict": bomb}, protocol=2)
    Path("c.pt").write_bytes(checkpoints.zipped(content) if how == "in the zip" else content)
    with pytest.raises(DataError, match="more than tensors"):
        checkpoint.load(Path("c.pt"))
    assert not Path(CANARY).exists()
    pickle.loads(content)  # it would
    assert Path(CANARY).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": "1"}, "version"), ({"global_step": torch.ones(3)}, "version and step"), ({"data": 3}, "AttributeError"),
        ({"config": {}}, "KeyError"), ({"progress": {"epoch": "3"}}, "something else than"), ({"bandit": {}}, "KeyError"),
        ({"progress": {"epoch": -1}}, "negative"), ({"tally": None}, "TypeError"), ({"optimizer_state_dict": []}, "TypeError"),
        ({"model_state_dict": {"output_layer.weight": 3}}, "not a dense tensor"), ({"model_state_dict": []}, "AttributeError"),
    ],
)  # fmt: skip
def test_a_checkpoint_with_another_content_says_what(change, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = torch.load(io.BytesIO(checkpoints.good()), weights_only=True)
    if "progress" in change:
        change = {"progress": {**loaded["progress"], **change["progress"]}}
    torch.save({**loaded, **change}, checkpoints.FILE)
    with pytest.raises(DataError, match=words):
        checkpoints.read_all()


def test_weights_that_are_no_numbers_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = torch.load(io.BytesIO(checkpoints.good()), weights_only=True)
    loaded["model_state_dict"]["output_layer.bias"][0] = torch.nan
    torch.save(loaded, checkpoints.FILE)
    with pytest.raises(DataError, match=r"NaN or infinite: output_layer\.bias"):
        checkpoints.read_all()


# --- through the command line -----------------------------------------------------------------


def _bad_files(folder: Path) -> None:
    toy.write_parquet(folder / "good.parquet", buildings=4, images=2, dim=4)
    whole = (folder / "good.parquet").read_bytes()
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "torn.parquet").write_bytes(whole[:-200])
    (folder / "foreign.parquet").write_bytes(b"PAR1" + bytes(200) + b"\xff\xff\xff\xffPAR1")
    table = toy.table(buildings=3)
    twice = pa.table([*table.columns, table["embedding"]], [*table.column_names, "embedding"])
    pq.write_table(twice, folder / "twice.parquet")
    pq.write_table(tables.metadata(), folder / "metadata.parquet")
    (folder / "deep.toml").write_text("[training]\nmargin = " + "[" * 3000)
    (folder / "raw.toml").write_bytes(b"\xff\xfe\0")
    (folder / "bomb.pt").write_bytes(
        pickle.dumps(checkpoints.Bomb(eval, f"open({CANARY!r}, 'w').close()"))
    )
    torch.save({"model_state_dict": []}, folder / "other.pt")
    (folder / "zeros.pt").write_bytes(bytes(500))


TRAIN = "--set=paths.train_parquet_path="


@pytest.mark.parametrize(
    ("command", "code"),
    [
        *((["data", "check", f"{TRAIN}{name}.parquet"], 3) for name in ("empty", "torn", "foreign", "twice", "metadata")),
        (["data", "split", "torn.parquet", "out"], 3),
        (["data", "bands", f"{TRAIN}good.parquet", "--set=paths.difficulty_metadata_path=a\0b"], 2),
        (["train", f"{TRAIN}good.parquet", "--set=paths.difficulty_metadata_path=good.parquet"], 3),
        (["train", f"{TRAIN}good.parquet", "--set=training_model.hidden_dim=1000000000000000000"], 2),
        (["train", f"{TRAIN}good.parquet", "--set=training.batch_size=" + "9" * 5000], 2),
        (["train", f"{TRAIN}good.parquet", "--webhook", "~nobody-here/x"], 2),
        (["train", f"{TRAIN}good.parquet", "--set=training.resume_from_checkpoint=bomb.pt"], 3),
        (["data", "check", "--config", "deep.toml"], 2),
        (["data", "check", "--config", "raw.toml"], 2),
        (["data", "check", "--config", "."], 2),
        (["embed", "good.parquet", "out.parquet", "--checkpoint", "bomb.pt"], 3),
        (["embed", "good.parquet", "out.parquet", "--checkpoint", "other.pt"], 3),
        (["embed", "good.parquet", "out.parquet", "--checkpoint", "zeros.pt"], 3),
        (["export", "head", "--checkpoint", "other.pt"], 3),
        (["tune", f"{TRAIN}good.parquet", f"--set=tuning.storage_url=postgresql:\\\\u:{SECRET}@h/d"], 2),
        (["status", "--study-name", "$(touch canary)"], 2),
    ],
    ids=lambda value: " ".join(value)[:60].replace("\0", "0") if isinstance(value, list) else str(value),
)  # fmt: skip
def test_a_command_refuses_it_in_one_message(command, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(config.ENV_PREFIX)]:
        monkeypatch.delenv(name)
    _bad_files(tmp_path)
    found = cli.run(lambda: cli.app(command, prog_name="tripletkit", standalone_mode=False))
    said = capsys.readouterr().err
    assert (found, "Traceback" in said, "error: " in said) == (code, False, True), said
    assert SECRET not in said
    assert not Path(CANARY).exists()
    assert not list(tmp_path.glob("out*")) or not any(Path("out").iterdir())
