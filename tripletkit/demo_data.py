"""Real data for the demo: the characters of the fonts that matplotlib ships, seen as buildings."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tripletkit.errors import ConfigError, RunError
from tripletkit.fsio import atomic_write
from tripletkit.log import logger

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

# Text cuts only: Computer Modern's code points are not Unicode's, the symbol and display files
# draw a character in one way, and the last-resort file draws a box for everything.
FAMILIES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral")

# Left out: combining marks (no place of their own), controls, private use, blanks, and braille:
# 255 grids of dots that differ by single dots are a task of their own.
LEFT_OUT = ("M", "C", "Z")
BRAILLE = range(0x2800, 0x2900)

# A character that fewer cuts draw, each in its own way, is left out: box drawing, for one.
MIN_PICTURES = 4
MIN_IMAGES = 10  # a building with fewer pictures is seen from several sides

# Drawn OVER times larger, moved there, averaged down. The em box and the baseline are fixed, so
# that "o" and "O", "," and "'" differ; the ink is centred across, because side bearings belong
# to the typesetter.
SIDE, OVER = 28, 3
CANVAS = SIDE * OVER
EM, BASELINE = 56, 62

# How far a view strays from the straight one, at most: images of a building differ so.
TURN, ZOOM, SHEAR, SHIFT = math.radians(10), 0.12, 0.10, 1.5 * OVER

# The embedding: strength of the edges in 8 directions over a 7 x 7 grid.
DIRECTIONS, CELLS = 8, 7
DIM = DIRECTIONS * CELLS * CELLS

ROW_GROUP = 2048

SCHEMA = pa.schema(
    [
        ("building_id", pa.string()),
        ("streetview_image_id", pa.string()),
        ("embedding", pa.list_(pa.float32(), DIM)),
    ]
)


def write_fonts(folder: Path, *, seed: int, characters: Collection[int] | None = None) -> Path:
    """Write `folder/fonts.parquet`, rendered characters as a data set, and return its path.

    A building is a visual character ("U+0041"); an image is its picture in one font cut, seen
    from a slightly different place each time ("U+0041/DejaVuSans-Bold/0"); the embedding is
    `describe` of that view. Same fonts, same libraries, same `seed`: same bytes. `characters`
    restricts the code points. Raises ConfigError without matplotlib or pillow.
    """
    cuts = _open_cuts()
    logger.info("drawing the characters of %d font cuts", len(cuts))
    buildings = _buildings(_pictures(cuts, characters))
    if not buildings:
        raise RunError(f"no character has {MIN_PICTURES} different pictures in {', '.join(cuts)}")
    path = folder / "fonts.parquet"
    rows = 0
    with atomic_write(path) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        views = _views(cuts, buildings, seed)
        while batch := list(islice(views, ROW_GROUP)):
            writer.write_table(_table(batch))
            rows += len(batch)
    logger.info("%s: %d characters, %d images, dimension %d", path, len(buildings), rows, DIM)
    return path


def describe(views: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Edge strength by direction and place, [n, DIM], of grey pictures [n, SIDE, SIDE].

    Rectified derivatives in DIRECTIONS directions, pooled over a grid with overlapping
    triangular windows, square root: an oriented-gradient descriptor (Dalal and Triggs 2005)
    under the Hellinger kernel (Arandjelovic and Zisserman 2012). Like the features of a
    network and unlike pixels, it changes little when the picture moves by a pixel; on bare
    pixels a linear head cannot undo the moves and ends below the raw embedding.
    """
    padded = np.pad(views.astype(np.float32) / 255, ((0, 0), (1, 1), (1, 1)))
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    channels = []
    for angle in np.arange(DIRECTIONS, dtype=np.float32) * np.float32(2 * np.pi / DIRECTIONS):
        edge = np.maximum(right * np.cos(angle) + down * np.sin(angle), 0)
        channels.append(_pool(_pool(edge).swapaxes(1, 2)).swapaxes(1, 2))
    return np.sqrt(np.stack(channels, axis=1).reshape(len(views), DIM))


def _pool(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, SIDE, w] -> [n, CELLS, w]: triangular windows two cells wide, one per cell."""
    step = SIDE // CELLS
    weights = 1 - np.abs(np.arange(2 * step, dtype=np.float32) + 0.5 - step) / step
    padded = np.pad(maps, ((0, 0), (step // 2, step // 2), (0, 0)))
    # A plain sum and no matrix product: its bits do not depend on the number of threads.
    pooled = np.zeros((len(maps), CELLS, maps.shape[2]), np.float32)
    for offset, weight in enumerate(weights):
        pooled += weight * padded[:, offset : offset + SIDE - step + 1 : step]
    return pooled


def _open_cuts() -> dict[str, tuple[FreeTypeFont, list[int]]]:
    """Each font cut by name, with the code points that it really has."""
    try:
        import matplotlib as mpl
        from matplotlib.ft2font import FT2Font
        from PIL import ImageFont
    except ImportError as error:
        raise ConfigError(
            f"the demo draws its data from the fonts of matplotlib: {error}",
            hint="pip install 'tripletkit[plots]'",
        ) from error
    cuts = {}
    for file in sorted(Path(mpl.get_data_path(), "fonts", "ttf").glob("*.ttf")):
        if file.stem.startswith(FAMILIES) and "Display" not in file.stem:
            # Basic layout: the result does not depend on an installed text shaper.
            font = ImageFont.truetype(str(file), EM, layout_engine=ImageFont.Layout.BASIC)
            # Without this look-up a missing character would be drawn as a box.
            cuts[file.stem] = (font, sorted(FT2Font(str(file)).get_charmap()))
    return cuts


def _pictures(
    cuts: dict[str, tuple[FreeTypeFont, list[int]]], characters: Collection[int] | None
) -> dict[int, dict[str, bytes]]:
    """Digest of each straight picture, by character and cut."""
    digests: dict[int, dict[str, bytes]] = defaultdict(dict)
    for cut, (font, owned) in cuts.items():
        for character in owned:
            if characters is not None and character not in characters:
                continue
            if unicodedata.category(chr(character))[0] in LEFT_OUT or character in BRAILLE:
                continue
            picture = _draw(font, character)
            if picture is not None:
                digest = hashlib.blake2b(picture.tobytes(), digest_size=16).digest()
                digests[character][cut] = digest
    return digests


def _draw(font: FreeTypeFont, character: int) -> Image | None:
    """The upright picture, CANVAS x CANVAS, or None when it is blank or does not fit."""
    from PIL import Image, ImageDraw

    sheet = Image.new("L", (3 * CANVAS, 3 * CANVAS))
    origin = (CANVAS, CANVAS + BASELINE)
    ImageDraw.Draw(sheet).text(origin, chr(character), fill=255, font=font, anchor="ls")
    ink = sheet.getbbox()
    if ink is None:
        return None
    left, top, right, bottom = ink
    if right - left > CANVAS or top < CANVAS or bottom > 2 * CANVAS:
        return None
    start = (left + right - CANVAS) // 2
    return sheet.crop((start, CANVAS, start + CANVAS, 2 * CANVAS))


def _buildings(digests: dict[int, dict[str, bytes]]) -> dict[int, list[tuple[str, int]]]:
    """Pictures (cut, character) of each building, named after its lowest code point.

    Characters with the same picture in every cut that has both ("R" and Lisu "zha") are one
    building, and so are two that a third one joins: no eye could part them, and kept apart they
    would be false negatives. Characters that agree in some cuts only (hyphen-minus and
    hyphen) stay apart: twin houses, which real data has too, here one picture in 22. A picture
    that two cuts share counts once: its positive would be the very same drawing.
    """
    digests = {c: of for c, of in digests.items() if len(set(of.values())) >= MIN_PICTURES}
    twins: dict[tuple[str, bytes], list[int]] = defaultdict(list)
    for character in sorted(digests):
        for cut, digest in digests[character].items():
            twins[cut, digest].append(character)
    root = {character: character for character in digests}

    def find(character: int) -> int:
        while root[character] != character:
            character = root[character]
        return character

    for group in twins.values():
        for low, high in combinations(group, 2):
            one, other = digests[low], digests[high]
            if all(one[cut] == other[cut] for cut in one.keys() & other.keys()):
                first, second = sorted((find(low), find(high)))
                root[second] = first

    drawn: dict[int, dict[str, int]] = defaultdict(dict)
    for character in sorted(digests):
        for cut in digests[character]:
            drawn[find(character)].setdefault(cut, character)
    return {
        building: sorted({digests[char][cut]: (cut, char) for cut, char in of.items()}.values())
        for building, of in sorted(drawn.items())
    }


def _views(
    cuts: dict[str, tuple[FreeTypeFont, list[int]]],
    buildings: dict[int, list[tuple[str, int]]],
    seed: int,
) -> Iterator[tuple[str, str, NDArray[np.uint8]]]:
    """Building id, image id and view of every image."""
    for building, pictures in buildings.items():
        name = f"U+{building:04X}"
        for cut, character in pictures:
            picture = _draw(cuts[cut][0], character)
            assert picture is not None  # its digest was taken
            for number in range(math.ceil(MIN_IMAGES / len(pictures))):
                image = f"{name}/{cut}/{number}"
                yield name, image, _view(picture, f"{seed} {image}")


def _view(picture: Image, key: str) -> NDArray[np.uint8]:
    """The picture turned, sheared, zoomed and shifted a little, as `key` says: [SIDE, SIDE]."""
    from PIL.Image import Resampling, Transform

    # From a hash, not a generator: an image looks the same whatever else is drawn.
    bits = hashlib.blake2b(key.encode(), digest_size=40).digest()
    turn, zoom, shear, across, along = (np.frombuffer(bits, "<u8") / 2.0**63 - 1).tolist()
    scale = math.exp(zoom * ZOOM)
    cos, sin = scale * math.cos(turn * TURN), scale * math.sin(turn * TURN)
    # Pillow wants the way back: where in the picture a pixel of the view comes from.
    a, b, c, d = cos, -sin + shear * SHEAR, sin, cos
    middle = CANVAS / 2
    e = middle * (1 - a - b) + across * SHIFT
    f = middle * (1 - c - d) + along * SHIFT
    moved = picture.transform(
        (CANVAS, CANVAS), Transform.AFFINE, (a, b, e, c, d, f), Resampling.BILINEAR
    )
    return np.asarray(moved.reduce(OVER))


def _table(batch: list[tuple[str, str, NDArray[np.uint8]]]) -> pa.Table:
    buildings, images, views = zip(*batch, strict=True)
    embedding = pa.FixedSizeListArray.from_arrays(describe(np.stack(views)).ravel(), DIM)
    return pa.table([pa.array(buildings), pa.array(images), embedding], schema=SCHEMA)
