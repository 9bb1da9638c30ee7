"""The documentation says what is: links, commands, exit codes, names of keys and fields."""

import ast
import functools
import json
import re
import shlex
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import typer

from tests.test_loop import data, paths, run  # noqa: F401 - fixtures
from tripletkit import config, errors
from tripletkit.cli import app
from tripletkit.train import checkpoint as checkpoints

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
PAGES = sorted(REPOSITORY.glob("docs/**/*.md")) + [README] * README.exists()
FENCE = re.compile(r"^ *```(\S*).*?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^(?: {4}.*\n)+", re.MULTILINE)
SHELL = ("", "sh", "console", "indented")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))


# --- links -----------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """The page without its code."""
    return re.sub(r"`[^`\n]*`", "", INDENTED.sub("", FENCE.sub("", page.read_text())))


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    found = set()
    seen: Counter[str] = Counter()
    for title in re.findall(r"^#+ +(.+)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@each_page
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_every_page_is_in_the_index():
    index = REPOSITORY / "docs/index.md"
    listed = re.findall(r"\]\(([^)\s]+)\)", index.read_text())
    pages = {str(p.relative_to(index.parent)) for p in PAGES if p not in (index, README)}
    assert pages - set(listed) == set()


# --- code ------------------------------------------------------------------------------------


def code(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each block; language "indented" for those without a fence."""
    text = page.read_text()
    indented = [("indented", block) for block in INDENTED.findall(FENCE.sub("", text))]
    return FENCE.findall(text) + indented


def commands(page: Path) -> list[list[str]]:
    """The words of every `tripletkit ...` in the shell blocks and in the text."""
    lines = []
    for language, text in code(page):
        if language in SHELL:
            lines += text.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(tripletkit [^`\n]+)`", FENCE.sub("", page.read_text()))
    found = []
    for line in lines:
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        try:
            parts = list(words)
        except ValueError:  # output with an apostrophe in it, say
            continue
        while "tripletkit" in parts:
            parts = parts[parts.index("tripletkit") :]
            end = next((i for i, p in enumerate(parts) if set(p) <= set("|&;<>()")), len(parts))
            found.append(parts[1:end])
            parts = parts[max(end, 1) :]
    return [words for words in found if words]


@functools.cache
def program() -> typer.core.TyperGroup:
    """What `tripletkit` understands; building it takes a tenth of a second."""
    return typer.main.get_command(app)


def problem(words: list[str]) -> str | None:
    """What is wrong with the arguments of a `tripletkit` command."""
    command = program()
    words = list(words)
    positional = 0
    while words:
        word = words.pop(0)
        options = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}
        options = {name: p for name, p in options.items() if name.startswith("-")}
        if word == "--help":
            continue
        if word.startswith("-"):
            name, equals, value = word.partition("=")
            if name not in options:
                return f"no option {name}"
            if options[name].is_flag:
                continue
            if not equals:
                if not words:
                    return f"no value for {name}"
                value = words.pop(0)
            if name in ("--set", "-s") and "KEY=VALUE" not in value:
                try:
                    config.load(None, [value], {})
                except errors.ConfigError as error:
                    return error.message
        elif hasattr(command, "commands"):
            if word in ("COMMAND", "..."):
                return None
            if word not in command.commands:
                return f"no command {word}"
            command = command.commands[word]
        else:
            positional += 1
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    return "too many arguments" if positional > len(arguments) else None


@each_page
def test_commands_are_real_and_so_are_their_options(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = {" ".join(words): problem(words) for words in commands(page)}
    assert {words: why for words, why in wrong.items() if why} == {}


def test_a_wrong_command_would_be_noticed():
    assert problem(["data", "check", "--set", "training.margin=0.3"]) is None
    assert problem(["data", "bands", "--neighbours", "60"]) == "no option --neighbours"
    assert problem(["trian"]) == "no command trian"
    assert problem(["evaluate", "--split"]) == "no value for --split"
    assert problem(["train", "config.toml"]) == "too many arguments"
    assert "no key 'margn'" in str(problem(["train", "--set", "training.margn=0.3"]))


@each_page
def test_toml_is_a_configuration_and_python_compiles(page, tmp_path):
    for language, text in code(page):
        if language == "toml":
            assert tomllib.loads(text)
            file = tmp_path / "config.toml"
            file.write_text(text)
            config.load(file, (), {})
        elif language == "python":
            compile(text, str(page), "exec")


# --- the command line page -------------------------------------------------------------------


CLI = REPOSITORY / "docs/reference/cli.md"


def rows(text: str) -> list[list[str]]:
    """Cells of the lines below the heads of markdown tables."""
    bodies = re.findall(r"^\|.*\n\|[-| :]+\n((?:\|.*\n?)*)", text, re.MULTILINE)
    lines = [line for body in bodies for line in body.splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def section(page: Path, title: str) -> str:
    """The text below a heading of the second level."""
    after = re.split(rf"^## {re.escape(title)}$", page.read_text(), flags=re.MULTILINE)[1]
    return after.partition("\n## ")[0]


def leaves(command, name: str = "tripletkit") -> dict[str, typer.core.TyperCommand]:
    if not hasattr(command, "commands"):
        return {name: command}
    return {k: v for n, c in command.commands.items() for k, v in leaves(c, f"{name} {n}").items()}


def options(command) -> set[str]:
    return {n for p in command.params for n in p.opts if n.startswith("-")} - {
        "--help", "--install-completion", "--show-completion",
    }  # fmt: skip


def test_every_command_and_option_is_on_the_page():
    """Apart from the generator: that the page is up to date says test_config."""
    titles = re.findall(r"^## (tripletkit .+)$", CLI.read_text(), re.MULTILINE)
    root = program()
    assert titles == list(leaves(root))
    shared = {
        n
        for title in ("Options of every command", "Options of jobs")
        for row in rows(section(CLI, title))
        for n in re.findall(r"`(-[-\w]+)", row[0])
    }
    assert options(root) <= shared
    for name, command in leaves(root).items():
        text = section(CLI, name)
        table = {n for row in rows(text) for n in re.findall(r"`(-[-\w]+)", row[0])}
        also = "(#options-of-every-command)" in text or "(#options-of-jobs)" in text
        assert options(command) - table <= (shared if also else set()), name


def test_exit_codes_are_those_of_the_errors():
    family = errors.TripletkitError.__subclasses__()
    real = {error.__name__: error.exit_code for error in family} | {"DONE": errors.DONE}
    table = rows(section(CLI, "Exit codes"))
    assert {row[1].strip("`"): int(row[0]) for row in table} == real


# --- the page of the Alliance's clusters ------------------------------------------------------


def test_the_environment_by_hand_has_what_tripletkit_needs():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[^\w-]", each)[0] for each in project["dependencies"]}
    # There pyarrow comes from a module, and the wheelhouse has psycopg2 under its plain name.
    needed = needed - {"pyarrow", "psycopg2-binary"} | {"psycopg2"}
    text = (REPOSITORY / "docs/how-to/alliance-canada.md").read_text()
    by_hand = re.findall(r"^pip install --no-index (\w.*)$", text, re.MULTILINE)
    assert {name for line in by_hand for name in line.split()} == needed


# --- the data formats page -------------------------------------------------------------------


FORMATS = REPOSITORY / "docs/reference/data-formats.md"


def names(text: str) -> set[str]:
    """The quoted names in the first column of the tables."""
    return {name for row in rows(text) for name in re.findall(r"`([^`]+)`", row[0])}


def test_checkpoint_keys_are_the_documented_ones(paths, data):  # noqa: F811
    run(paths, data, num_epochs=1)
    state = checkpoints.load(paths.final)
    text = section(FORMATS, "Checkpoints")
    weights = {re.sub(r"\.\d+\.", ".N.", name) for name in state["model_state_dict"]}
    assert state.keys() <= names(text)
    assert weights <= names(text)
    extra = names(text) - state.keys() - weights
    assert all(name.startswith(("hidden_layers.N", "hidden_norms.N")) for name in extra)
    for key in ("progress", "metrics", "bandit", "config"):
        missing = [name for name in state[key] if f"`{name}`" not in text]
        assert missing == [], key


def test_metric_fields_are_the_documented_ones(paths, data):  # noqa: F811
    run(paths, data, num_epochs=1)
    start, epoch = (json.loads(line) for line in paths.metrics.read_text().splitlines())
    written = names(section(FORMATS, "metrics.jsonl"))
    real = {re.sub(r"@\d+", "@K", name) for name in {*start, *epoch, *epoch["bands"]}}
    assert written == real


def test_run_folder_holds_the_documented_files(paths, data):  # noqa: F811
    run(paths, data, num_epochs=2, save_every_n_epochs=1)
    written = names(section(FORMATS, "Run folder"))
    real = {re.sub(r"_\d+\.pt", "_N.pt", path.name) for path in paths.root.iterdir()}
    real = {re.sub(r"code_[0-9a-f]+\.", "code_HASH.", name) for name in real}
    assert real <= written


def test_provenance_fields_are_the_documented_ones(paths, data):  # noqa: F811
    run(paths, data, num_epochs=1)
    found = json.loads(paths.provenance.read_text())
    start = found["starts"][0]
    facts = {name for each in found["data"].values() for name in each}
    written = names(section(FORMATS, "provenance.json"))
    assert {*found, *facts, *start} == written
    text = section(FORMATS, "provenance.json")
    for part in ("machine", "trainer"):
        assert [name for name in start[part] if f"`{name}`" not in text] == []
    assert [name for name in start["code"]["tripletkit"] or () if f"`{name}`" not in text] == []


# --- the page of what was done to break it -----------------------------------------------------


@functools.cache
def names_of_tests(file: str) -> list[str]:
    path = REPOSITORY / "tests" / file
    body = ast.parse(path.read_text()).body if path.exists() else []
    functions = [each.name for each in body if isinstance(each, ast.FunctionDef)]
    return [name for name in functions if name.startswith("test_")]


def selected(file: str, words: str) -> list[str]:
    """The words of `-k "A or B"` that occur in the name of a test of a file."""
    return [
        word for word in words.split(" or ") if any(word in name for name in names_of_tests(file))
    ]


def test_the_tests_that_the_reliability_page_names_exist():
    """Of a cell: `test_X.py`, `test_X.py -k WORDS`, or -k WORDS or a word for the files in it."""
    wrong = []
    page = REPOSITORY / "docs/explanation/reliability.md"
    for *_, cell in rows(page.read_text()):
        files = set(re.findall(r"test_\w+\.py", cell))
        wrong += [name for name in files if not (REPOSITORY / "tests" / name).exists()]
        for text in re.findall(r"`([^`]+)`", cell):
            named = re.search(r"test_\w+\.py", text)
            words = re.search(r"-k \"?([\w ]+)\"?$|^(\w+)$", text)
            among = {named[0]} if named else files
            if words and not any(selected(file, words[1] or words[2]) for file in among):
                wrong.append(f"{sorted(among)}: {text}")
    assert wrong == []


def test_a_test_that_does_not_exist_would_be_noticed():
    assert selected("test_docs.py", "noticed or nothing_like_it") == ["noticed"]
    assert selected("test_docs.py", "nothing" + "_at_all") == []
