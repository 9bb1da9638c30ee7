"""Names from anybody, wherever they travel: shell, paths, terminal, page, markdown, JSON, SQL."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from tests import fleet, toy
from tests.browser import browser  # noqa: F401 - fixture
from tests.cluster import ACCOUNT
from tripletkit import cli, log
from tripletkit import config as configuration
from tripletkit.cluster import launch, queue
from tripletkit.config import Config, Slurm
from tripletkit.errors import ConfigError, StorageError, TripletkitError
from tripletkit.paths import study_paths
from tripletkit.tune import database, storage

PACKAGE = Path(configuration.__file__).parents[1]
# `X` is a file that appears where a shell, and `hit` a variable that is set where a page, obeys.
NAMES = {
    "spaces": "  two  words ",
    "quotes": "'\"'\\'\"",
    "substitution": "$(touch X)${IFS}",
    "backticks": "`touch X`",
    "semicolon": "a;touch X;b",
    "pipe": "a|touch X&b>X<X",
    "newline": "a\ntouch X\nerror: no",
    "tab": "a\tb",
    "override": "a\u202etxt.exe\u2066",
    "combining": "e\u0301\u0323\u200d\u200b",
    "up": "../../X",
    "dash": "--help",
    "percent": "%j%%n%s%(name)s",
    "braces": "{}{0.__class__}{{title}}",
    "markup": "[bold]a[/bold][link=http://evil.example]b[/]",
    "script": "</script><script>hit=1</script><img src=http://evil.example/x onerror=hit=1>",
    "sql": "'; DROP TABLE trials; --",
    "nul": "a\0b",
    "long": "x" * 300,
    "emoji": ":smile:\U0001f600",
    "escape": "\x1b]0;owned\x07\x1b[31mred\x1b[2J\x9b5m",
}
hostile = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def tripletkit(*arguments: str | Path) -> int:
    words = list(map(str, arguments))
    return cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))


def is_harmless(text: str) -> bool:
    """Whether a terminal shows it, and does nothing else."""
    allowed = "\n\t"
    turns = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return all(
        c in allowed
        or (unicodedata.category(c) != "Cc" and unicodedata.bidirectional(c) not in turns)
        for c in text
    )


# --- names of studies --------------------------------------------------------------------------------


@hostile
def test_a_study_of_that_name_is_refused_by_its_key(name):
    with pytest.raises(ConfigError, match=r"tuning\.study_name") as caught:
        configuration.load(overrides=[f"tuning.study_name={name}"], environ={})
    assert "\x1b" not in caught.value.message


@settings(deadline=None)
@given(st.from_regex(r"[A-Za-z0-9._-]{1,120}", fullmatch=True) | st.text(max_size=20))
@example(".")
@example("..")
@example("a\n")
@example("-rf")
def test_the_name_of_a_study_is_one_folder_and_one_word_of_a_shell(name):
    try:
        config = configuration.with_values(Config(), tuning={"study_name": name})
    except ConfigError:  # by its key: the test above
        return
    root = study_paths(config).root
    assert root.parent == config.output_dir
    assert Path(os.path.normpath(root)) == root
    assert shlex.quote(name) == name
    assert not name.startswith("-")
    assert len(os.fsencode(name)) <= 100


# --- the terminal --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text())
@example(NAMES["escape"] + NAMES["override"])
def test_no_text_moves_the_terminal(text):
    assert is_harmless(log.visible(text))
    same = "".join(c for c in text if is_harmless(c))
    assert log.visible(text).replace("\N{REPLACEMENT CHARACTER}", "") == same.replace(
        "\N{REPLACEMENT CHARACTER}", ""
    )


@hostile
@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_printed_shows_names_and_obeys_none(name, terminal):
    """Also in a table, a title, and as text with a style; rich's own colours stay."""
    console = log._Console(
        file=StringIO(), force_terminal=terminal, color_system="standard" if terminal else None, width=1000,
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip
    table = Table("head", title=Text(name))
    table.add_row(Text(name, style="red"))
    console.print(name, soft_wrap=True)
    console.print(table)
    said = console.file.getvalue()
    assert ("\x1b[31m" in said) == terminal
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said) if terminal else said
    assert is_harmless(plain)
    if name.isprintable() and name == name.strip() and "\t" not in name:
        assert name in plain


@hostile
def test_a_line_of_a_log_holds_no_command_for_a_terminal(name, tmp_path):
    with log.also_to(tmp_path / "log"):
        log.logger.warning("building %s is in two splits", name)
    assert is_harmless((tmp_path / "log").read_text())


# --- hints that are there to be copied -------------------------------------------------------------------

FOLDER = "my lab's $(touch X);touch X"


def commands_in(text: str) -> list[list[str]]:
    """The words of each command between backticks, as a shell reads them."""
    return [shlex.split(each) for each in re.findall(r"`(tripletkit [^`]*)`", text)]


def test_a_command_in_a_hint_can_be_copied(tmp_path):
    folder = tmp_path / FOLDER
    with pytest.raises(StorageError) as caught:
        database.connection(folder)
    assert commands_in(caught.value.hint) == [["tripletkit", "db", "up", str(folder)]]
    folder.mkdir()
    record = {"host": "127.0.0.1", "port": 1, "user": "u", "password": "p", "database": "d"}
    (folder / "connection.json").write_text(json.dumps({**record, "node": "elsewhere"}))
    with pytest.raises(ConfigError) as refused:
        database.connection(folder)
    first, second = commands_in(refused.value.hint)
    assert first == ["tripletkit", "db", "down", str(folder)]
    assert second == ["tripletkit", "db", "up", str(folder), "--cluster", "slurm"]


def test_no_path_is_in_a_command_that_we_show_unless_it_is_quoted():
    """In all of the source: `tripletkit ... {folder}` in a text is a command for a shell."""
    paths = re.compile(r"\b(folder|path|paths?\.\w+|root|file|config_file|storage_path)\b")
    shown = 0
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.JoinedStr):
                continue
            before = ""
            for part in node.values:
                if isinstance(part, ast.Constant):
                    before += str(part.value)
                    continue
                command = re.search(r"tripletkit [a-z]+( [^`{]*)?$", before.rpartition("`")[2])
                words = ast.unparse(part.value)
                if command and not words.startswith("shlex."):
                    shown += 1
                    # `word` and `folder` of a quoted assignment are checked by the test above.
                    quoted = f"{words} = shlex.quote(" in file.read_text()
                    assert quoted or not paths.search(words), f"{file}: {before}{{{words}}}"
                before += "X"
    assert shown > 5


# --- shell and Slurm -----------------------------------------------------------------------------------


@hostile
def test_a_job_of_that_name_is_refused_or_one_quoted_word(name, tmp_path, monkeypatch):
    """What bash and sbatch make of the script: bash runs it with an srun that does nothing."""
    monkeypatch.setattr(queue, "available", lambda: True)
    monkeypatch.chdir(tmp_path)
    job = launch.Job("train", f"train:{name}", Slurm(gpus=0), tmp_path / "logs")
    if not name.isprintable() or "\\" in name:
        with pytest.raises(ConfigError, match="job's name"):
            launch.script(job)
        with pytest.raises((ConfigError, ValidationError), match="account"):
            launch.script(replace(job, name="x", slurm=Slurm(gpus=0, account=name)))
        return
    job = replace(job, slurm=Slurm(gpus=0, account=name, partition=name))
    text = launch.script(job)
    flags = [shlex.split(line.partition(" ")[2]) for line in text.splitlines() if "#SBATCH" in line]
    assert all(len(words) == 1 for words in flags)
    assert [f"--job-name=train:{name}"] in flags
    assert [f"--account={name}"] in flags
    done = subprocess.run(
        ["bash", "-c", f"srun() {{ :; }}\n{text}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_on_slurm_a_run_in_an_odd_folder_is_trained_and_nothing_else_happens(slurm, tmp_path):
    """Command line, pickle, script, queue, log, record and folder of a job with such a name."""
    printable = [name for name in NAMES.values() if name.isprintable() and len(name) < 100]
    odd = "".join(printable).replace("/", "").replace("\\", "")[:180]
    config = fleet.write_config(
        tmp_path, training={"num_epochs": 1}, paths={"checkpoint_dir": tmp_path / odd},
        slurm={"mem": "1000M"},
    )  # fmt: skip
    out = fleet.tripletkit("train", "-c", config, "--cluster", "slurm", "--account", ACCOUNT)
    job = re.search(r"slurm job (\d+)\nlog:", out)[1]
    slurm.wait_state(job, {"COMPLETED"}, deadline=240)
    assert (tmp_path / odd / "checkpoint_final.pt").exists()
    (past,) = queue.past([job])
    assert past.name.startswith("train:")
    assert not [path for path in tmp_path.rglob("*") if path.name == "X"]


# --- one run of names that came with the data ----------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A run whose folder, data, columns, buildings and branch have hostile names; it has ended."""
    root = tmp_path_factory.mktemp("odd") / "a;$(touch X) `touch X` [bold]{0}%j é\u0301:smile:'\""
    root.mkdir()
    names = list(NAMES.values())

    def write(file: Path, first: int) -> None:
        data = toy.table(buildings=len(names) * 2, images=4, dim=16, first=first, noise=0.6)
        order = sorted(set(data["building_id"].to_pylist()))
        renamed = {b: names[i % len(names)] + str(first + i) for i, b in enumerate(order)}
        ids = [f"{names[i % len(names)]}{first}-{i}" for i in range(len(data))]
        data = data.set_column(
            1, "building_id", pa.array([renamed[b.as_py()] for b in data["building_id"]])
        )
        data = data.set_column(0, "streetview_image_id", pa.array(ids))
        for name in ("$(touch X)", "<script>hit=1</script>", "\x1b[31m", "'; DROP TABLE x; --"):
            data = data.append_column(name, pa.array([name] * len(data)))
        pq.write_table(data, file)

    write(root / "train.parquet", 0)
    write(root / "val.parquet", 1000)
    config = configuration.with_values(
        Config(),
        global_={"scratch_dir": root, "log_dir": root / "logs"},
        paths={"train_parquet_path": root / "train.parquet", "val_parquet_path": root / "val.parquet",
               "checkpoint_dir": root / "run <script>hit=1</script>".replace("/", "")},
        training={"num_epochs": 1, "batch_size": 16, "device": "cpu", "monitor": "map@r",
                  "retrieval_metric_top_k": [1]},
        training_model={"hidden_dim": 16, "output_dim": 8},
        tuning={"storage_path": root / "stu dy';.db"},
    )  # fmt: skip
    file = root / "config.toml"
    file.write_text(configuration.dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        branch = "x;$(touch${IFS}X)<script>hit=1</script>"
        for words in (["init", "-q", "-b", branch], ["config", "user.email", "a@b"],
                      ["config", "user.name", "a"], ["commit", "-q", "--allow-empty", "-m", "x"]):  # fmt: skip
            subprocess.run(["git", *words], check=True, capture_output=True)
        assert tripletkit("train", "-c", file) == 0
    return file, config


def nothing_happened(folder: Path) -> None:
    assert not [path for path in folder.parent.rglob("*") if path.name == "X"]


def test_commands_show_hostile_names_and_write_below_their_folders(odd, capsys, monkeypatch):
    file, config = odd
    root = file.parent
    monkeypatch.chdir(root)
    outside = set(root.parent.parent.iterdir())
    for command in (
        ("data", "check", "-c", file),
        ("evaluate", "-c", file, "--split", "val"),
        ("embed", root / "val.parquet", root / "out.parquet", "-c", file),
        ("export", root / "head $(touch X)", "-c", file, "--format", "safetensors"),
        ("diff", config.checkpoint_dir, config.checkpoint_dir),
        ("tune", "-c", file, "--cluster", "here", "--prepare"),
        ("status", "-c", file),
    ):
        capsys.readouterr()
        assert tripletkit(*command) == 0, capsys.readouterr().err
        said = capsys.readouterr()
        assert is_harmless(said.out + said.err), command
    assert tripletkit("evaluate", "-c", file, "--split", "val", "--json") == 0
    json.loads(capsys.readouterr().out)
    embedded = pq.read_table(root / "out.parquet")
    source = pq.read_table(root / "val.parquet")
    assert embedded["building_id"].to_pylist() == source["building_id"].to_pylist()
    card = (root / "head $(touch X)/README.md").read_text()
    assert "<script>" not in re.sub(r"\\[<>]", "", card)
    assert is_harmless(card)
    assert set(root.parent.parent.iterdir()) == outside
    nothing_happened(root)


def test_the_page_shows_hostile_names_runs_nothing_and_asks_nobody(
    odd,
    browser,  # noqa: F811
    monkeypatch,
):
    file, config = odd
    monkeypatch.chdir(file.parent)
    monkeypatch.setitem(sys.modules, "umap", None)  # one map is enough, and it takes long to load
    assert tripletkit("report", "-c", file) == 0
    page = config.checkpoint_dir / "report.html"
    text = page.read_text()
    assert "\x1b" not in text
    browser.open(page)
    assert browser.js("return typeof window.hit") == "undefined"
    assert browser.requested() == [page.as_uri()]
    assert not [line for line in browser.logs() if "evil.example" in line]
    assert not browser.js("return document.querySelectorAll('img[onerror]').length")
    nothing_happened(file.parent)


# --- the study's storage ---------------------------------------------------------------------------------


def test_what_a_trial_failed_with_is_data_for_the_storage(tmp_path):
    config = configuration.with_values(
        Config(), tuning={"storage_path": tmp_path / "a'; DROP TABLE trials; --.db"}
    )
    study = storage.create(config.tuning).study
    for name in NAMES.values():
        trial = study.ask()
        trial.set_user_attr("cause", {"kind": name, "message": name})
        study.tell(trial, 0.5)
    shared = storage.open_study(config.tuning, seed=0, workers=1)
    messages = [trial.user_attrs["cause"]["message"] for trial in shared.study.trials]
    assert messages == list(NAMES.values())


@hostile
def test_an_address_or_a_path_like_that_is_one_of_our_errors(name, tmp_path):
    for key, value in (
        ("storage_url", f"postgresql://u@127.0.0.1:1/{name}"),
        ("storage_path", str(tmp_path / name.replace("/", ""))),
    ):

        def use(key: str = key, value: str = value) -> None:
            config = configuration.load(overrides=[f"tuning.{key}={value}"], environ={})
            storage.open_study(config.tuning, seed=0, workers=1, patience=0)

        with pytest.raises((TripletkitError, OSError)) as caught:
            use()
        if isinstance(caught.value, TripletkitError):
            assert caught.value.exit_code in (2, 5)
        else:  # the boundary says it with the path
            assert caught.value.filename
    assert list(tmp_path.iterdir()) == []
