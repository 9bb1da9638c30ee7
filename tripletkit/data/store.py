"""Embeddings as memory-mapped arrays: a cache of the parquet files, built once and shared."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tripletkit import fsio
from tripletkit.data import damage, flat, parquet
from tripletkit.data.parquet import BUILDING, EMBEDDING, Table
from tripletkit.errors import DataError, RunError
from tripletkit.log import logger

FORMAT = 1  # part of the key: caches of another layout are not found, let alone misread
META = "meta.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Store:
    """N images of B buildings. All arrays are read-only maps of files in `folder`."""

    source: Path  #: what the user named
    folder: Path  #: of its cache
    fingerprint: str  #: of the content, whatever the name
    embeddings: NDArray[Any]  #: [N, D] float16 or float32
    ids: pa.ChunkedArray  #: large_string [N], image ids
    building_ids: pa.ChunkedArray  #: large_string [B]
    building: NDArray[np.int32]  #: [N] code of each row's building; -1: not in this sample
    by_building: NDArray[np.int64]  #: [M] rows grouped by building, in file order inside one
    starts: NDArray[np.int64]  #: [B + 1] building b: by_building[starts[b] : starts[b + 1]]


def open_store(source: Path, cache_dir: Path, *, dim: int | None = None) -> Store:
    """Open the embeddings of a parquet file, folder or glob; the first time, build their cache.

    `dim` is the length that the vectors must have. Raises `DataError` for input that cannot be
    used and `RunError` when the cache cannot be written.
    """
    files = parquet.find_files(source)
    key = content_key(files)
    folder = cache_dir / key
    facts = cached(folder, partial(_build, files, key, dim), _check)
    if facts.get("odd"):
        logger.warning("%s: %s", source, facts["odd"])
    if dim is not None and facts["dim"] != dim:
        raise DataError(
            f"{source}: column {EMBEDDING!r} has vectors of {facts['dim']} numbers, not {dim}",
            hint="training_model.input_dim, or the data that it was set for, says otherwise",
        )
    return Store(
        source=source,
        folder=folder,
        fingerprint=key,
        embeddings=flat.map_array(folder / f"embeddings.{facts['dtype']}").reshape(
            -1, facts["dim"]
        ),
        ids=flat.map_texts(folder / "images.arrow"),
        building_ids=flat.map_texts(folder / "buildings.arrow"),
        **_codes(folder),
    )


def content_key(files: Sequence[Path]) -> str:
    """The fingerprint of a store of these files, without building its cache."""
    return fsio.digest([f"store {FORMAT}", parquet.fingerprint(files)])


def whole(store: Store) -> Store:
    """The store that `store` is a sample of."""
    return replace(store, **_codes(store.folder))


def subsample(store: Store, *, fraction: float = 1.0, buildings: int = 0, seed: int) -> Store:
    """A random part of the buildings, with all their images: at most `fraction` and `buildings`.

    A hash of the building id decides, so that more data does not change who is in; 0 buildings
    means no limit. Codes and rows stay those of the full store: a building left out has no rows
    in `by_building`, its rows have `building` -1.
    """
    if fraction >= 1 and buildings == 0:
        return store
    # Salted apart from the split, else a fraction of one split would not be a random one.
    hashes = parquet.hash_texts(store.building_ids, f"sample {seed}")
    sizes = np.diff(store.starts)
    keep = (hashes < min(fraction, 1.0) * 2.0**64) & (sizes > 0)
    if 0 < buildings < np.count_nonzero(keep):
        chosen = np.flatnonzero(keep)
        chosen = chosen[np.argsort(hashes[chosen], kind="stable")[:buildings]]
        keep = np.isin(np.arange(len(keep)), chosen)
    if not (sizes[keep] > 1).any():
        raise DataError(
            f"{store.source}: no building with two images in a sample of "
            f"{np.count_nonzero(keep)} of {len(keep)} buildings",
            hint="raise sample_fraction or sample_buildings",
        )
    rows = store.by_building[keep[store.building[store.by_building]]]
    building = np.full_like(store.building, -1)
    building[rows] = store.building[rows]
    starts = np.concatenate([[0], np.cumsum(np.where(keep, sizes, 0))])
    return replace(store, building=building, by_building=rows, starts=starts)


def check_leakage(stores: Mapping[str, Store]) -> None:
    """Raise `DataError` when a building has images in two of the `stores`, keyed by split."""
    used = {
        split: store.building_ids.filter(pa.array(np.diff(store.starts) > 0))
        for split, store in stores.items()
    }
    for one, other in combinations(used, 2):
        both = used[one].filter(pc.is_in(used[one], value_set=used[other]))
        if len(both):
            shown = ", ".join(both.slice(0, parquet.SHOWN).to_pylist())
            raise DataError(
                f"{len(both):,} buildings are in both {one} ({stores[one].source}) and {other} "
                f"({stores[other].source}): {shown}{', ...' if len(both) > parquet.SHOWN else ''}",
                hint="`tripletkit data split` splits by building",
            )


def describe(store: Store) -> dict[str, int | str]:
    """What is in the store, for people."""
    sizes = np.diff(store.starts)
    sizes = sizes[sizes > 0]
    return {
        "rows": len(store.by_building),
        "buildings": len(sizes),
        "buildings with 2 or more images": int(np.count_nonzero(sizes > 1)),
        "images per building, fewest": int(sizes.min()),
        "images per building, median": int(np.median(sizes)),
        "images per building, most": int(sizes.max()),
        "dim": store.embeddings.shape[1],
        "dtype": str(store.embeddings.dtype),
    }


# --- cache folders ---------------------------------------------------------------------------


def cached(
    folder: Path,
    build: Callable[[Path], dict[str, Any]],
    check: Callable[[Path, dict[str, Any]], None],
) -> dict[str, Any]:
    """Make sure that `folder` holds what `build(aside)` writes; return the facts it returned.

    Of processes that start together one builds and the others wait. The folder appears whole, by
    a rename; one that is damaged, for which `check(folder, facts)` raises ValueError, is built
    again. Raises `RunError` when it cannot be written.
    """
    facts = _facts(folder, check)
    if facts is not None:
        return facts
    try:
        with fsio.exclusive_lock(folder.with_name(f".{folder.name}.lock")) as lock:
            facts = _facts(folder, check)  # another process may have built it meanwhile
            if facts is not None:
                return facts
            if lock.sure:
                fsio.remove_leftovers(folder.parent, f".{folder.name}.*.tmp")
            if folder.exists():
                logger.warning("%s is damaged: building it again", folder)
                shutil.rmtree(folder)
            return _publish(folder, build, check)
    except OSError as error:
        raise RunError(
            f"{folder.parent}: the cache cannot be written: {error.strerror or error}",
            hint="paths.cache_dir can be on another disk",
        ) from None


def _publish(
    folder: Path,
    build: Callable[[Path], dict[str, Any]],
    check: Callable[[Path, dict[str, Any]], None],
) -> dict[str, Any]:
    aside = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        facts = build(aside)
        facts["files"] = {path.name: path.stat().st_size for path in aside.iterdir()}
        fsio.write_json(aside / META, facts)
        fsio.publish_folder(aside, folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and (theirs := _facts(folder, check)) is not None:
            return theirs  # where there are no locks, another builder was faster
        raise
    return facts


def _facts(folder: Path, check: Callable[[Path, dict[str, Any]], None]) -> dict[str, Any] | None:
    """What is known of a finished folder; None when it is not there, torn or foreign."""
    try:
        facts: dict[str, Any] = fsio.parse_json((folder / META).read_text())
        if not all((folder / name).stat().st_size == n for name, n in facts["files"].items()):
            return None
        check(folder, facts)
    except (
        FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError, AttributeError,
        ArithmeticError, pa.ArrowException,
    ):  # fmt: skip
        return None  # but of other errors a disk or a lack of memory is the cause
    return facts


def _check(folder: Path, facts: dict[str, Any]) -> None:
    """Raise ValueError when the files of a store cannot be what was written."""
    rows, dim, dtype = facts["rows"], facts["dim"], facts["dtype"]
    numbers = isinstance(rows, int) and isinstance(dim, int) and dim > 0
    if dtype not in ("f16", "f32") or not numbers:
        raise ValueError("not the facts that were written")
    codes = _codes(folder)
    if flat.map_array(folder / f"embeddings.{dtype}").size != rows * dim:
        raise ValueError("not all of the vectors")
    if len(codes["building"]) != rows:
        raise ValueError("not all of the rows")
    damage.check_groups(**codes)
    damage.check_texts(flat.map_texts(folder / "images.arrow"), rows)
    damage.check_texts(flat.map_texts(folder / "buildings.arrow"), len(codes["starts"]) - 1)


@contextlib.contextmanager
def writing_to(folder: Path, needed: int) -> Iterator[None]:
    """Raise `RunError` when `folder` cannot be written or has not got `needed` bytes left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except OSError as error:
        problem = f"{folder}: cannot be written: {error.strerror or error}"
        if error.errno in DISK_FULL:
            problem += f"; {needed:,} bytes are needed, {shutil.disk_usage(folder).free:,} are free"
        raise RunError(
            problem, hint="paths.cache_dir and global.scratch_dir say where caches go"
        ) from None


def _codes(folder: Path) -> dict[str, Any]:
    names = ("building.i32", "by_building.i64", "starts.i64")
    return {name.partition(".")[0]: flat.map_array(folder / name) for name in names}


# --- building --------------------------------------------------------------------------------


def _build(files: tuple[Path, ...], key: str, dim: int | None, aside: Path) -> dict[str, Any]:
    """Write the files of a store into `aside`: of the content with that key, and no other."""
    with parquet.unchanged(files, lambda: content_key(files) == key):
        return _write(files, dim, aside)


def _write(files: tuple[Path, ...], dim: int | None, aside: Path) -> dict[str, Any]:
    """Ids come first: they are quick to find wrong."""
    from tripletkit.data.embeddings import (
        write_embeddings,  # with torch, which a reader may not need
    )

    id_columns = parquet.image_id_columns(files[0])
    table = parquet.open_table(files, [*id_columns, BUILDING, EMBEDDING])
    width, dtype = parquet.embedding_width(table, dim)
    per_row = 2 * width + 64  # the ids and codes of a row are about 64 bytes
    with writing_to(aside.parent, table.total * per_row):
        _write_index(aside, table, id_columns)
        written, why, odd = write_embeddings(aside, table, width, dtype)
    logger.info(
        "%s: %s rows of %d numbers, kept as %s: %s",
        table.name,
        f"{table.total:,}",
        width,
        np.dtype(flat.DTYPES[written]),
        why,
    )
    return {
        "format": FORMAT,
        "rows": table.total,
        "dim": width,
        "dtype": written,
        "why": why,
        "odd": odd,
        "sources": [path.name for path in table.files],
    }


def _write_index(aside: Path, table: Table, id_columns: tuple[str, ...]) -> None:
    """Image ids, building ids, and who belongs to whom."""
    per_row = aside / "building_of_rows.arrow"
    hashes = []
    with (
        flat.text_writer(aside / "images.arrow") as add_image,
        flat.text_writer(per_row) as add_building,
    ):
        for batch in parquet.batches(table, [*id_columns, BUILDING]):
            ids = parquet.image_ids(batch, id_columns)
            hashes.append(parquet.hash_texts(ids, "duplicates"))
            add_image(ids)
            add_building(parquet.text(batch, BUILDING))
    _check_duplicates(table, np.concatenate(hashes), flat.map_texts(aside / "images.arrow"))

    encoded = flat.map_texts(per_row).dictionary_encode()  # all chunks have one dictionary
    building = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    sizes = np.bincount(building)
    if sizes.max() < 2:
        raise DataError(
            f"{table.name}: no building has two images, so there are no pairs to learn from",
            hint=f"is {BUILDING!r} different for each row?",
        )
    with flat.text_writer(aside / "buildings.arrow") as add:
        add(encoded.chunk(0).dictionary)
    flat.write_array(aside / "building.i32", building)
    flat.write_array(aside / "by_building.i64", np.argsort(building, kind="stable"))
    flat.write_array(aside / "starts.i64", np.concatenate([[0], np.cumsum(sizes)]))
    per_row.unlink()


def _check_duplicates(table: Table, hashes: NDArray[np.uint64], ids: pa.ChunkedArray) -> None:
    """Raise `DataError` naming images that occur twice. Equal hashes only make a suspect."""
    ordered = np.sort(hashes)
    if (ordered[1:] != ordered[:-1]).all():
        return
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    found = []
    for first, second in sorted(zip(order[same].tolist(), order[same + 1].tolist(), strict=True)):
        if ids[first].equals(ids[second]):
            found.append(
                f"{ids[first].as_py()!r} ({_place(table, first)} and {_place(table, second)})"
            )
        if len(found) == parquet.SHOWN:
            break
    if found:
        raise DataError(
            f"{table.name}: {len(same):,} rows repeat an image id: {'; '.join(found)}",
            hint="each image may be there once",
        )


def _place(table: Table, row: int) -> str:
    path, row = table.locate(row)
    return f"{path.name} row {row}"
