"""Real data for the ablation: places in the photographs that scikit-learn and matplotlib ship.

A building is a square of a photograph, an image is a view of it: turned, zoomed, shifted, with
other light and noise. The squares do not overlap, so that splits by building share no pixels but
at their rims. The embedding is the descriptor of the demo.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tripletkit.demo_data import DIM, SIDE, describe
from tripletkit.fsio import atomic_write

SQUARE = 20  # pixels of the photograph, and the stride
VIEWS = 12
RIM = 8  # pixels that a moved view may look beyond its square
FLAT = 6.0  # standard deviation below which a square is sky or wall: nothing to see
TURN, ZOOM, SHIFT, GAIN, NOISE = np.radians(25), 0.2, 3.0, 0.4, 6.0

SCHEMA = pa.schema(
    [
        ("building_id", pa.string()),
        ("streetview_image_id", pa.string()),
        ("embedding", pa.list_(pa.float32(), DIM)),
    ]
)


def write_patches(folder: Path) -> Path:
    """Write `folder/patches.parquet` and return its path; the same bytes on every call."""
    path = folder / "patches.parquet"
    with atomic_write(path) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for name, photo in photographs().items():
            views, buildings, images = [], [], []
            for top in range(RIM, photo.shape[0] - SQUARE - RIM, SQUARE):
                for left in range(RIM, photo.shape[1] - SQUARE - RIM, SQUARE):
                    if photo[top : top + SQUARE, left : left + SQUARE].std() < FLAT:
                        continue
                    building = f"{name}/{top}/{left}"
                    for number in range(VIEWS):
                        buildings.append(building)
                        images.append(f"{building}/{number}")
                        views.append(view(photo, top, left, images[-1]))
            flat = pa.array(describe(np.stack(views)).ravel())
            embedding = pa.FixedSizeListArray.from_arrays(flat, DIM)
            columns = [pa.array(buildings), pa.array(images), embedding]
            writer.write_table(pa.table(columns, schema=SCHEMA))
    return path


def photographs() -> dict[str, np.ndarray]:
    """Grey photographs [height, width], float32."""
    import matplotlib as mpl
    import sklearn.datasets
    from PIL import Image

    files = [Path(mpl.get_data_path(), "sample_data", "grace_hopper.jpg")]
    files += sorted(Path(sklearn.datasets.__file__).parent.glob("images/*.jpg"))
    return {f.stem: np.asarray(Image.open(f).convert("L"), dtype=np.float32) for f in files}


def view(photo: np.ndarray, top: int, left: int, key: str) -> np.ndarray:
    """The square as `key` says it is seen: uint8 [SIDE, SIDE]."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    random = np.random.default_rng(seed)
    turn, zoom, down, right, gain = random.uniform(-1, 1, 5)
    grid = (np.arange(SIDE) + 0.5) / SIDE * SQUARE - SQUARE / 2
    y, x = np.meshgrid(grid, grid, indexing="ij")
    scale, angle = np.exp(ZOOM * zoom), TURN * turn
    rows = top + SQUARE / 2 + scale * (np.cos(angle) * y - np.sin(angle) * x) + SHIFT * down
    columns = left + SQUARE / 2 + scale * (np.sin(angle) * y + np.cos(angle) * x) + SHIFT * right
    seen = bilinear(photo, rows, columns) * np.exp(GAIN * gain)
    return np.clip(seen + random.normal(0, NOISE, seen.shape), 0, 255).astype(np.uint8)


def bilinear(photo: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The photograph between its pixels."""
    rows = np.clip(rows - 0.5, 0, photo.shape[0] - 1.001)
    columns = np.clip(columns - 0.5, 0, photo.shape[1] - 1.001)
    i, j = rows.astype(int), columns.astype(int)
    a, b = rows - i, columns - j
    upper = photo[i, j] * (1 - b) + photo[i, j + 1] * b
    lower = photo[i + 1, j] * (1 - b) + photo[i + 1, j + 1] * b
    return upper * (1 - a) + lower * a
