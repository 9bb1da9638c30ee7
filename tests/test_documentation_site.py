"""The documentation as a site: it builds without a warning, every page is reached, no link is dead."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Literal
from urllib.parse import unquote, urldefrag, urlparse

import pytest
import typer
import yaml

import tripletkit
from tests import reference_cli

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
CANARY = "of-whoever-builds-it"


class Page(HTMLParser):
    """What a page links to, loads, and can be linked at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag == "form" and "action" in given:  # the search
            self.links.add(given["action"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon"):
            self.loads.add(given["href"])
        elif "src" in given:
            self.loads.add(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site, without a network: proxies that nobody serves would make a download fail."""
    folder = tmp_path_factory.mktemp("site")
    surroundings = {
        "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "KEY": CANARY,
    }  # fmt: skip
    done = subprocess.run(
        [
            sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "--quiet",
            "-d", folder / "doctrees", DOCS, folder / "html",
        ],
        env={**os.environ, **surroundings}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def local(here: Path, targets: set[str]) -> Iterator[tuple[str, Path, str]]:
    """(as written, file, anchor) of the targets that are part of the site."""
    for target in targets:
        if not urlparse(target).scheme:
            name, anchor = urldefrag(re.sub(r"\?[^#]*", "", target))
            yield target, (here.parent / unquote(name)).resolve() if name else here, unquote(anchor)


def test_every_source_has_its_page(site):
    sources = {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")}
    built = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
    assert sources - built == set()


def test_every_page_is_reached_from_the_index(site, pages):
    reached, waiting = set(), [(site / "index.html").resolve()]
    while waiting:
        here = waiting.pop()
        if here not in reached and here in pages:
            reached.add(here)
            waiting += [file for _, file, _ in local(here, pages[here].links)]
    assert pages.keys() - reached == set()


def test_no_link_is_dead(pages):
    dead = [
        (path.name, target)
        for path, page in pages.items()
        for target, file, anchor in local(path, page.links | page.loads)
        if not file.is_file() or (anchor and file in pages and anchor not in pages[file].anchors)
    ]
    assert dead == []


def test_nothing_is_loaded_from_elsewhere(pages):
    assert {url for page in pages.values() for url in page.loads if urlparse(url).scheme} == set()


def test_nothing_of_the_environment_is_in_it(site):
    """Defaults of functions are shown as they are written: `os.environ` is one of them."""
    for path in site.rglob("*"):
        if path.is_file() and path.suffix in (".html", ".js", ".txt", ".inv"):
            text = path.read_bytes()
            assert CANARY.encode() not in text, path
            assert str(REPOSITORY).encode() not in text, path
    assert "os.environ" in (site / "reference/api.html").read_text().replace("</span>", "").replace(
        '<span class="pre">', ""
    )


def test_the_sidebar_has_the_sections_and_the_order_of_the_index(site):
    text = (DOCS / "index.md").read_text()
    titles = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    html = (site / "index.html").read_text()
    sidebar = html[html.index('<div class="sidebar-tree">') :]
    places = [sidebar.index(f'<span class="caption-text">{title}</span>') for title in titles]
    assert places == sorted(places)


def test_the_version_is_that_of_the_package(site):
    assert f"tripletkit {tripletkit.__version__}" in (site / "index.html").read_text()


def test_the_python_page_describes_what_it_names(site):
    html = (site / "reference/api.html").read_text()
    for name in ("data.store.open_store", "train.loop.train", "train.retrieval.retrieve"):
        assert f'id="tripletkit.{name}"' in html
    # Backticks of docstrings are code, and nothing of their markup is left over.
    assert "`" not in html.partition('<div class="article-container">')[2].partition("<script")[0]


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in DOCS.rglob("*.svg")}
    assert {name: size for name, size in sizes.items() if size > 150_000} == {}


def test_the_citation_is_that_of_this_version():
    cff = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert cff["cff-version"] == "1.2.0"
    assert cff["type"] == "software"
    assert cff["title"] == "tripletkit"
    assert cff["version"] == tripletkit.__version__
    assert cff["license"] == "MIT"
    assert cff["date-released"].isoformat() > "2026"
    assert all(author.keys() == {"name"} and author["name"] for author in cff["authors"])
    allowed = {
        "abstract", "authors", "cff-version", "date-released", "keywords", "license", "message",
        "title", "type", "version",
    }  # fmt: skip
    assert cff["message"]
    assert cff.keys() <= allowed


# --- the generator of the command line page --------------------------------------------------


@pytest.fixture(scope="module")
def toy() -> dict:
    """Commands with everything that Typer has, by their full names."""
    app, group = typer.Typer(), typer.Typer()
    app.add_typer(group, name="group")

    @app.command()
    def plain() -> None:
        """Do *nothing*, with `a|b`."""

    @app.command(hidden=True)
    def secret() -> None: ...

    @group.command("nested")
    def nested(
        files: Annotated[list[Path], typer.Argument(help="Some <files>.")],
        into: Annotated[Path | None, typer.Argument(metavar="[FOLDER]")] = None,
        kind: Annotated[Literal["a", "b"], typer.Option("--kind", "-k", help="Which.")] = "a",
        many: Annotated[list[int] | None, typer.Option(help="Each.")] = None,
        color: Annotated[bool, typer.Option("--color/--no-color")] = True,
        workers: Annotated[str | None, typer.Option(metavar="VALUE", help="Of the study.")] = None,
        quiet: Annotated[bool, typer.Option("--quiet", hidden=True)] = False,
    ) -> None:
        """One line.

        And a second paragraph.
        """

    return dict(reference_cli.tree(typer.main.get_command(app), "toy"))


def test_nested_commands_are_found_and_hidden_ones_are_not(toy):
    assert list(toy) == ["toy", "toy plain", "toy group", "toy group nested"]


def test_every_kind_of_parameter_has_its_row(toy):
    text = reference_cli.section("toy group nested", toy["toy group nested"], "A note.")
    assert text == dedent("""\
        ## toy group nested

        One line.

        And a second paragraph.

        ```text
        toy group nested [OPTIONS] FILES... [FOLDER]
        ```

        | option | value | default | meaning |
        |---|---|---|---|
        | `FILES...` | path |  | Some \\<files>. |
        | `FOLDER` | path |  |  |
        | `--kind`, `-k` | `a`, `b` | `a` | Which. |
        | `--many` | integer, repeatable |  | Each. |
        | `--color` / `--no-color` |  | `True` |  |
        | `--workers` | integer | `tuning.workers` | Of the study. |

        A note.""")


def test_what_markdown_would_take_for_markup_is_escaped_outside_of_backticks(toy):
    text = reference_cli.section("toy plain", toy["toy plain"], None)
    assert r"Do \*nothing\*, with `a\|b`." in text
