"""A second real data set for the ablation: the functions of the installed Python modules."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import math
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tripletkit.fsio import atomic_write

# What tripletkit's own dependencies bring; a package that is not installed is passed over.
PACKAGES = ("matplotlib", "networkx", "numpy", "scipy", "sklearn", "sqlalchemy", "sympy", "torch")
# Neither tests nor copies of other packages, which would be the same modules under two names.
SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "pydoc_data"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages"}  # inside the standard library's folder
SKIPPED_FOLDERS |= {"_vendor", "vendored", "_external", "externals", "extern"}
SKIPPED_FILES = re.compile(r"(test_.*|.*_test|conftest|.*_pb2.*)\.py")
GENERATED = re.compile(r"auto-?generated|generated (by|from)|do not edit", re.IGNORECASE)

MIN_LINES = 8  # of a function; shorter ones say little about where they belong
MIN_FUNCTIONS, MAX_FUNCTIONS = 5, 40  # of a module
DIM = 512
HASHES = 8  # places of a token in the vector: one alone would make collisions heavy
ROW_GROUP = 2048

SCHEMA = pa.schema(
    [
        ("building_id", pa.string()),
        ("streetview_image_id", pa.string()),
        ("embedding", pa.list_(pa.float32(), DIM)),
    ]
)


def write_code(folder: Path) -> Path:
    """Write `folder/code.parquet` and return its path. The same installation gives the same bytes.

    A building is a module ("sympy.core.mul"), an image one of its functions
    ("sympy.core.mul/Mul.flatten:201"), the embedding the hashed tf-idf of the identifiers and of
    their parts. Modules that do the same job are false negatives, as real data has them. The
    hashing spreads the variance evenly (the within-module covariance's largest eigenvalue is
    2.4 times the mean, on the fonts 58 times), so a linear start has little to gain here: this
    is the hard set, where the raw embedding is a strong baseline.
    """
    buildings: list[str] = []
    images: list[str] = []
    counts: list[Counter[str]] = []
    for module, source in _modules():
        functions = _functions(source)
        if len(functions) < MIN_FUNCTIONS:
            continue
        named = {f"{module}/{name}": tokens for name, tokens in functions.items()}
        for image in sorted(sorted(named, key=_rank)[:MAX_FUNCTIONS]):
            buildings.append(module)
            images.append(image)
            counts.append(named[image])
    path = folder / "code.parquet"
    vectors = _embed(counts)
    with atomic_write(path) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        embedding = pa.FixedSizeListArray.from_arrays(vectors.ravel(), DIM)
        table = pa.table([pa.array(buildings), pa.array(images), embedding], schema=SCHEMA)
        writer.write_table(table, row_group_size=ROW_GROUP)
    return path


def _modules() -> Iterator[tuple[str, Path]]:
    """Name and file of every module of the standard library and of PACKAGES, sorted."""
    roots = [(Path(sysconfig.get_path("stdlib")), "")]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots.append((Path(spec.submodule_search_locations[0]), f"{package}."))
    for root, prefix in roots:
        for file in sorted(root.rglob("*.py")):
            inside = file.relative_to(root)
            if SKIPPED_FOLDERS.isdisjoint(inside.parts[:-1]) and not SKIPPED_FILES.fullmatch(
                file.name
            ):
                yield prefix + ".".join(inside.with_suffix("").parts), file


def _functions(file: Path) -> dict[str, Counter[str]]:
    """Token counts of the functions and methods of a file, by qualified name and line."""
    source = file.read_text(encoding="utf-8", errors="replace")
    if GENERATED.search(source[:500]):
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in others' strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # another Python's syntax
        return {}
    found: dict[str, Counter[str]] = {}

    def visit(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{outer}{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                # What a function nests is its own business, not an image more.
                if (child.end_lineno or 0) - child.lineno + 1 >= MIN_LINES:
                    found[f"{outer}{child.name}:{child.lineno}"] = _tokens(child)
            elif not isinstance(child, ast.expr):  # an if, a try, a with
                visit(child, outer)

    visit(tree, "")
    return {name: tokens for name, tokens in found.items() if tokens}


def _tokens(function: ast.AST) -> Counter[str]:
    """Identifiers in a function, whole and in parts; neither strings nor comments."""
    tokens: Counter[str] = Counter()
    for node in ast.walk(function):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                tokens.update(_parts(name))
            case ast.keyword(arg=str(name)) | ast.FunctionDef(name=name):
                tokens.update(_parts(name))
            case _:
                pass
    return tokens


@cache
def _parts(name: str) -> tuple[str, ...]:
    """`readHTTPLine_2` -> the whole, "read", "http", "line"."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return (f"={name}", *(word.lower() for word in words if len(word) > 1))


def _embed(counts: list[Counter[str]]) -> NDArray[np.float32]:
    """Unit rows [n, DIM]: (1 + ln tf) * ln(n / df), each token at HASHES signed places."""
    documents = Counter(token for count in counts for token in count)
    vectors = np.empty((len(counts), DIM))
    for row, count in enumerate(counts):
        weights = [
            (1 + math.log(times)) * math.log(len(counts) / documents[token])
            for token, times in count.items()
        ]
        places, signs = np.stack([_places(token) for token in count]).transpose(1, 0, 2)
        signed = signs * np.array(weights)[:, None]
        vectors[row] = np.bincount(places.ravel(), signed.ravel(), minlength=DIM)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors.astype(np.float32)


@cache
def _places(token: str) -> NDArray[np.int64]:
    """The HASHES places of a token, and their signs: [2, HASHES]."""
    bits = hashlib.blake2b(token.encode(), digest_size=4 * HASHES).digest()
    numbers = np.frombuffer(bits, "<u4").astype(np.int64)
    return np.stack([(numbers >> 1) % DIM, (numbers & 1) * 2 - 1])


def _rank(image: str) -> bytes:
    return hashlib.blake2b(image.encode(), digest_size=8).digest()


if __name__ == "__main__":
    print(write_code(Path(sys.argv[1])))
