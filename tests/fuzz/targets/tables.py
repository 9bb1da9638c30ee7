"""Parquet files: damaged bytes, and tables of any schema; through every command that reads them."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests import toy
from tests.fuzz.draw import Draw
from tests.fuzz.judge import Target
from tripletkit import stages
from tripletkit.apply import outputs
from tripletkit.config import Config
from tripletkit.data import bands, parquet, split, store
from tripletkit.errors import TripletkitError

FILE = Path("train.parquet")
META = Path("meta.parquet")


def read_all(file: Path) -> None:
    """`data check`, `data split`, the bands, and what `embed` reads first. Raises what refused the vectors."""
    errors: list[Exception] = []
    opened: store.Store | None = None

    def attempt(look: Callable[[], Any]) -> Any:
        try:
            return look()
        except (TripletkitError, OSError) as error:
            errors.append(error)
            return None

    opened = attempt(lambda: store.open_store(file, Path("cache")))
    if opened is not None:
        assert len(opened.embeddings) == len(opened.ids) == len(opened.building)
        assert np.isfinite(opened.embeddings).all()
        assert None not in opened.ids.to_pylist()
        attempt(lambda: bands.build_bands(opened, Path("built.parquet"), neighbors=3, k0=2))
        attempt(lambda: bands.open_bands(file, opened, Path("cache")))
        paths = {"train_parquet_path": file, "cache_dir": "cache", "difficulty_metadata_path": META}
        attempt(lambda: stages.check_data(Config(paths=paths)))  # type: ignore[arg-type]
    shares = {"train": 0.5, "val": 0.5}
    attempt(lambda: split.split_parquet(file, Path("out"), fractions=shares, seed=1))
    attempt(lambda: outputs.provenance_of(file))
    attempt(lambda: parquet.image_id_columns(file))
    attempt(lambda: outputs.carried(file, ["all"]))
    attempt(lambda: _every_batch(file))
    assert not list(Path("cache").glob(".*.tmp")) if Path("cache").exists() else True
    if opened is None:
        raise errors[0]


def _every_batch(file: Path) -> None:
    table = parquet.open_table([file], [parquet.BUILDING])
    for batch in parquet.batches(table, None):
        parquet.hash_texts(parquet.text(batch, parquet.BUILDING), "x")


def _parquet(data: bytes) -> None:
    FILE.write_bytes(data)
    if len(data) % 2:  # the damaged file is the metadata of a good one
        toy.write_parquet(Path("good.parquet"), buildings=4, images=2, dim=3)
        good = store.open_store(Path("good.parquet"), Path("cache"))
        found = bands.open_bands(FILE, good, Path("cache"))
        assert (np.diff(found.offsets) >= 0).all()
        assert len(found.neighbors) == found.offsets[-1]
        assert found.neighbors.max(initial=0) < 4
    read_all(FILE)


def _files() -> list[bytes]:
    found = []
    small: dict[str, Any] = {"buildings": 3, "images": 2, "dim": 2}
    for table in (
        toy.table(**small), toy.table(**small, lists="fixed", dtype="float16"), toy.table(**small, ids="dataset", lists="large"),
        toy.table(**small, ids="hash", integer_buildings=True, dtype="float64"), metadata(),
    ):  # fmt: skip
        for options in (
            {"compression": "none"}, {"compression": "zstd", "row_group_size": 2},
            {"compression": "snappy", "data_page_version": "2.0", "write_page_checksum": True},
            {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_index": True},
            {"compression": "none", "use_byte_stream_split": True, "use_dictionary": False},
        ):  # fmt: skip
            try:
                found.append(_written(table, **options))
            except (pa.ArrowException, OSError):
                continue
    return found


def metadata(names: tuple[str, str] = ("img-0-0", "b0000")) -> pa.Table:
    """Of difficulty bands, for the images of toy.table."""
    rows = [f"img-{b}-{i}" for b in range(4) for i in range(2)]
    columns = {
        bands.ANCHOR: [*rows[:-1], names[0] if names[0] not in rows else rows[-1]],
        bands.BUILDINGS: [["b0000", "b0001", names[1]]] * 8,
        bands.BANDS: pa.array([[0, 1, 2]] * 8, pa.list_(pa.int32())),
    }
    return pa.table(columns)


def _written(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


# --- any schema ------------------------------------------------------------------------------

NAMES = (
    "building_id", "embedding", "streetview_image_id", "dataset_id", "patch_id", "target_coord_hash", "neighbor_building_ids",
    "neighbor_bands", "Building_ID", "embedding ", "a.b", "list.element", "", "\0", "é", "building_id.x",
)  # fmt: skip


def _array(draw: Draw, rows: int, depth: int = 2) -> pa.Array:
    """A column of a type and with values that are mostly not the expected ones."""
    source = random.Random(draw.byte())
    kind = draw.below(22 if depth else 14)
    holes = draw.below(4) == 0
    texts = [
        draw.text() if draw.below(6) == 0 else f"x{i % 3 if draw.below(9) == 0 else i}"
        for i in range(rows)
    ]
    texts = [t.encode(errors="replace").decode() for t in texts]
    if holes:
        texts = [None if source.random() < 0.3 else t for t in texts]
    if kind == 0:
        return pa.array(texts, pa.string())
    if kind == 1:
        return pa.array(texts, pa.large_string())
    if kind == 2:
        return pa.array(texts, pa.string()).dictionary_encode()
    if kind == 3:
        return pa.array(texts, pa.string_view())
    if kind == 4:
        return pa.array(
            [None if t is None else t.encode() + b"\xff" for t in texts],
            draw.of((pa.binary(), pa.large_binary())),
        )
    if kind == 5:  # bytes under the name of a string, as a careless writer leaves them
        raw = pa.array([(t or "").encode()[:9] + draw.bytes(3) for t in texts], pa.binary())
        return pa.StringArray.from_buffers(rows, *raw.buffers()[1:])
    if kind in (6, 7):
        whole = (pa.int8(), pa.uint8(), pa.int32(), pa.int64(), pa.uint64(), pa.int16())
        return pa.array(
            [None if holes and i % 3 == 0 else i % 100 for i in range(rows)], draw.of(whole)
        )
    if kind == 8:
        return pa.array(
            [draw.of((0.0, 1.5, float("nan"), 1e300)) for _ in range(rows)], pa.float64()
        )
    if kind == 9:
        return pa.nulls(rows)
    if kind == 10:
        return pa.array([bool(i % 2) for i in range(rows)])
    if kind == 11:
        return pa.array(
            [i * 10**9 for i in range(rows)],
            draw.of((pa.timestamp("ns"), pa.duration("us"), pa.date64())),
        )
    if kind == 12:
        return pa.array(
            [None if t is None else i for i, t in enumerate(texts)], pa.decimal128(30, 5)
        )
    if kind == 13:
        return pa.array([bytes(16)] * rows, pa.binary(16))
    if kind in (14, 15, 16):
        width = draw.of((1, 2, 3, 0, 4096))
        width = min(width, 60_000 // max(rows, 1))
        values = [source.choice((0.0, 1.0, -2.5, float("nan"), float("inf"), 1e-30, 70_000.0, 1e300))
                  if draw.below(40) == 0 else source.random() for _ in range(rows * width)]  # fmt: skip
        dtype = draw.of(("float32", "float64", "float16"))
        with np.errstate(over="ignore"):
            flat = pa.array(np.array(values, "float64").astype(dtype))
        if kind == 14:
            return (
                pa.FixedSizeListArray.from_arrays(flat, width)
                if width
                else pa.array([[]] * rows, pa.list_(pa.float32()))
            )
        ends = [i * width for i in range(rows + 1)]
        if draw.below(4) == 0 and rows > 1:
            ends[1] = draw.below(ends[2] + 1)
        if kind == 15:
            return pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), flat)
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat)
    if kind == 17:
        return pa.StructArray.from_arrays(
            [_array(draw, rows, 0), _array(draw, rows, 0)], ["embedding", "x"]
        )
    if kind == 18:
        return pa.array(
            [None if holes and i % 2 else [("k", i)] for i in range(rows)],
            pa.map_(pa.string(), pa.int32()),
        )
    if kind in (19, 20):
        inner = _array(draw, 2 * rows, depth - 1)
        return pa.ListArray.from_arrays(pa.array(range(0, 2 * rows + 1, 2), pa.int32()), inner)
    return pa.FixedSizeListArray.from_arrays(_array(draw, rows * 2, depth - 1), 2)


def _expected(draw: Draw, name: str, rows: int) -> pa.Array:
    if name == "building_id":
        return pa.array([f"b{i // 2}" for i in range(rows)])
    if name == "embedding":
        return toy.as_lists(
            np.arange(rows * 2, dtype="float32").reshape(rows, 2),
            draw.of(("list", "large", "fixed")),
        )
    if name == "neighbor_building_ids":
        return pa.array([["b0", "b1", "b2"]] * rows)
    if name == "neighbor_bands":
        return pa.array(
            [[0, 1, draw.of((2, 100))]] * rows,
            draw.of((pa.list_(pa.int8()), pa.list_(pa.uint8()), pa.list_(pa.int64()))),
        )
    return pa.array([f"{name}{i}" for i in range(rows)])


def _table(draw: Draw) -> pa.Table:
    rows = draw.of((6, 4, 8, 0, 1, 2, 300))
    arrays, names = [], []
    for name in (*NAMES[:2], draw.of(NAMES[2:6]), *NAMES[6:8]):
        if draw.below(12) == 11:
            continue
        names.append(draw.of(NAMES) if draw.below(16) == 15 else name)
        arrays.append(_array(draw, rows) if draw.below(5) == 4 else _expected(draw, name, rows))
    for _ in range(draw.below(3)):
        names.append(draw.of(NAMES))
        arrays.append(_array(draw, rows))
    table = pa.Table.from_arrays(arrays, names)
    hostile = {
        draw.text().encode(errors="replace"): draw.text().encode(errors="replace")
        for _ in range(draw.below(3))
    }
    if draw.flag():
        hostile[b"tripletkit"] = draw.of(
            (b"[" * 5000, b"9" * 5000, b"{}", b"null", b"\xff", b'{"made_by": "tripletkit embed"}')
        )
    if draw.below(6) == 0:
        hostile[b"pandas"] = draw.of((b"{}", b"[]", b"\xff", b'{"columns": 3}'))
    return table.replace_schema_metadata(hostile)


def _schema(data: bytes) -> None:
    draw = Draw(data)
    tables = [_table(draw) for _ in range(1 + (draw.below(4) == 3))]
    for number, table in enumerate(tables):
        path = FILE if len(tables) == 1 else Path("many") / f"{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        options: dict[str, Any] = {
            "compression": draw.of(("none", "zstd", "gzip")), "row_group_size": draw.of((1000, 1, 3)),
            "use_dictionary": draw.flag(), "data_page_version": draw.of(("1.0", "2.0")),
            "store_schema": draw.below(3) > 0,
        }  # fmt: skip
        try:
            pq.write_table(table, path, **options)
        except (pa.ArrowException, TypeError, ValueError, UnicodeError):
            return  # pyarrow does not write such a table
    if len(tables) > 1:
        (Path("many") / "notes.txt").write_text("x")
        (Path("many") / ".hidden.parquet").write_bytes(b"x")
    if draw.flag():
        pq.write_table(_good_meta(), META)
    read_all(FILE if len(tables) == 1 else Path("many"))


def _good_meta() -> pa.Table:
    return metadata()


def _draws() -> list[bytes]:
    source = random.Random(5)
    return [b"", *(source.randbytes(n) for n in range(10, 400, 6))]


PARQUET = Target(
    _parquet,
    _files,
    [
        b"PAR1",
        b"\x15",
        b"\xff\xff\xff\xff\x0f",
        b"embedding",
        b"building_id",
        b"\x80\x80\x80\x80\x08",
    ],
)
SCHEMA = Target(_schema, _draws)
