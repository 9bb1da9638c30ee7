"""What tripletkit needs: bounds that are tested, pins that are complete."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# What every environment has, and what PyTorch's files for a GPU bring along.
EVERYWHERE = re.compile(r"(pip|setuptools|triton|nvidia-.*|cuda-.*)$")


def requirements() -> list[Requirement]:
    """Of run time and every extra, without the extras' own names."""
    extras = PROJECT["optional-dependencies"].values()
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]
    return [r for r in map(Requirement, texts) if r.name != PROJECT["name"]]


def pins(name: str) -> dict[str, Version]:
    """Versions by package; every line that is no comment must be a pin."""
    lines = (ROOT / ".ci" / name).read_text().splitlines()
    found = [
        re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s*]+)", line) for line in lines if line[:1] != "#"
    ]
    assert all(found), name
    versions = {canonicalize_name(m[1]): Version(m[2]) for m in found}
    assert len(versions) == len(found), "a package twice"
    return versions


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_lower_bound_is_the_version_that_is_tested(requirement):
    (bound,) = requirement.specifier
    assert bound.operator == ">="
    name = canonicalize_name(requirement.name)
    assert pins("constraints-oldest.txt")[name] == Version(bound.version)
    assert pins("constraints.txt")[name] in requirement.specifier


def test_every_package_that_the_tests_need_is_pinned():
    """As installed here: what a package asks for, of its extras too, has a pin that satisfies it."""
    pinned = pins("constraints.txt")
    todo = [(r, extra) for r in requirements() for extra in ("", *r.extras)]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if EVERYWHERE.match(name):
            continue
        assert name in pinned, f"{requirement} has no pin"
        environment = {**default_environment(), "extra": extra}
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate(environment):
                if canonicalize_name(needed.name) in pinned:
                    version = pinned[canonicalize_name(needed.name)]
                    assert needed.specifier.contains(version, prereleases=True), (name, text)
                todo += [(needed, each) for each in ("", *needed.extras)]
    assert len(seen) > 100


def test_what_is_said_of_python_is_one_thing():
    assert PROJECT["requires-python"] == ">=3.11"
    said = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3" in c]
    assert said == ["3.11", "3.12", "3.13"]
