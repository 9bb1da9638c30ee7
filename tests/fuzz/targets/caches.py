"""The mapped files of a cache: torn, foreign, or with other numbers in them."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from tests import toy
from tests.fuzz.draw import Draw
from tests.fuzz.judge import Target
from tripletkit.config import Training
from tripletkit.data import bands, store
from tripletkit.train.bandit import Bandit
from tripletkit.train.sampler import TripletIndex

BUILDINGS, IMAGES, DIM = 5, 3, 4


@functools.cache
def good() -> Path:
    """A file, its bands and its caches."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz.good."))
    toy.write_parquet(folder / "t.parquet", buildings=BUILDINGS, images=IMAGES, dim=DIM)
    opened = store.open_store(folder / "t.parquet", folder / "cache")
    bands.build_bands(opened, folder / "m.parquet", neighbors=4, k0=2)
    bands.open_bands(folder / "m.parquet", opened, folder / "cache")
    return folder


def _cache(data: bytes) -> None:
    draw = Draw(data)
    shutil.copytree(good() / "cache", "cache")
    kinds = sorted(p.relative_to("cache") for p in Path("cache").glob("*/*"))
    for _ in range(1 + draw.below(2)):
        path = Path("cache") / draw.of(kinds)
        _damage(draw, path)
    opened = store.open_store(good() / "t.parquet", Path("cache"))
    found = bands.open_bands(good() / "m.parquet", opened, Path("cache"))
    use(opened, found)


def _damage(draw: Draw, path: Path) -> None:
    """As a crash, a full disk, another program or another version of ours leaves it."""
    if not path.is_file():
        return
    content = path.read_bytes()
    kind = draw.below(8)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(content[: draw.below(len(content) + 1)])
    elif kind == 2:
        path.write_bytes(bytes(len(content)))
    elif kind == 3 and path.suffix == ".json":
        with contextlib.suppress(ValueError):  # damaged already
            path.write_text(json.dumps(draw.changed(json.loads(content))))
    elif kind == 4:
        path.unlink()
        path.mkdir()
    elif kind == 5:
        path.write_bytes(b"\xff" * len(content))
    elif kind == 6 and path.suffix[1:] in ("i32", "i64"):
        numbers = np.frombuffer(
            content, path.suffix[1:].replace("i32", "int32").replace("i64", "int64")
        ).copy()
        limits = np.iinfo(numbers.dtype)
        numbers[draw.below(len(numbers))] = draw.of(
            (-1, 0, 1, 5, 2**20, int(limits.max), int(limits.min))
        )
        path.write_bytes(numbers.tobytes())
    else:
        for _ in range(1 + draw.below(8)):
            place = draw.below(len(content))
            content = content[:place] + bytes([draw.byte()]) + content[place + 1 :]
        path.write_bytes(content)


def use(opened: store.Store, found: bands.Bands) -> None:
    """Read all of it, and draw triplets from it."""
    rows = BUILDINGS * IMAGES
    assert opened.embeddings.shape == (rows, DIM)
    assert len(opened.ids.to_pylist()) == len(opened.building) == rows
    assert len(opened.building_ids.to_pylist()) == BUILDINGS
    store.describe(opened)
    store.subsample(opened, buildings=3, seed=1)
    index = TripletIndex(opened, found, torch.device("cpu"))
    bandit = Bandit(Training(), index.bands, torch.device("cpu"))
    order = index.order(7)
    for _ in range(3):
        triplets = index.draw(order, torch.arange(len(order)), 11, bandit)
        for each in triplets[:3]:
            assert 0 <= int(each.min()) <= int(each.max()) < rows


def _seeds() -> list[bytes]:
    source = random.Random(3)
    return [source.randbytes(n) for n in range(3, 40) for _ in range(4)]


CACHE = Target(_cache, _seeds)
