"""Behaviour of the demo's data: characters of the installed fonts as buildings."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fontTools.ttLib import TTFont
from PIL import ImageFont

from tripletkit import demo_data
from tripletkit.demo_data import CELLS, DIM, DIRECTIONS, SIDE, describe, write_fonts
from tripletkit.errors import RunError

FONTS = Path(mpl.get_data_path()) / "fonts" / "ttf"
LETTERS = range(0x21, 0x180)


def rows(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    table = pq.read_table(path)
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)
    return (
        table["building_id"].to_pylist(),
        table["streetview_image_id"].to_pylist(),
        vectors,
    )


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fonts(tmp_path_factory.mktemp("letters"), seed=42, characters=LETTERS)


def test_the_file_has_the_input_schema_in_row_groups(letters: Path) -> None:
    assert letters.name == "fonts.parquet"
    file = pq.ParquetFile(letters)
    assert file.schema_arrow.names == ["building_id", "streetview_image_id", "embedding"]
    assert file.schema_arrow.field("building_id").type == pa.string()
    assert file.schema_arrow.field("streetview_image_id").type == pa.string()
    assert file.schema_arrow.field("embedding").type == pa.list_(pa.float32(), DIM)
    assert file.num_row_groups > 1
    assert [p.name for p in letters.parent.iterdir()] == ["fonts.parquet"]


def test_the_values_are_finite_and_no_picture_is_empty(letters: Path) -> None:
    _, _, vectors = rows(letters)
    assert np.isfinite(vectors).all()
    assert np.linalg.norm(vectors, axis=1).min() > 1


def test_image_ids_are_unique_and_start_with_their_building(letters: Path) -> None:
    buildings, images, _ = rows(letters)
    assert len(set(images)) == len(images)
    assert all(i.startswith(b + "/") for b, i in zip(buildings, images, strict=True))


def test_every_building_has_ten_images_or_more(letters: Path) -> None:
    buildings, _, _ = rows(letters)
    assert min(Counter(buildings).values()) >= 10
    assert len(set(buildings)) > 300


def test_no_two_images_are_equal(letters: Path) -> None:
    _, _, vectors = rows(letters)
    assert len(np.unique(vectors, axis=0)) == len(vectors)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_views(tmp_path: Path) -> None:
    some = range(0x41, 0x5B)
    one = write_fonts(tmp_path / "one", seed=1, characters=some)
    again = write_fonts(tmp_path / "again", seed=1, characters=some)
    other = write_fonts(tmp_path / "other", seed=2, characters=some)
    assert one.read_bytes() == again.read_bytes()
    assert rows(one)[1] == rows(other)[1]
    assert not np.allclose(rows(one)[2], rows(other)[2], atol=0.1)


def test_an_image_does_not_depend_on_what_else_is_drawn(letters: Path, tmp_path: Path) -> None:
    _, images, vectors = rows(letters)
    alone = rows(write_fonts(tmp_path, seed=42, characters=[0x6B]))
    of_k = [n for n, image in enumerate(images) if image.startswith("U+006B/")]
    assert alone[1] == [images[n] for n in of_k]
    np.testing.assert_array_equal(alone[2], vectors[of_k])


def test_only_cuts_that_really_have_the_character_draw_it(tmp_path: Path) -> None:
    # DejaVu has the zhe with diaeresis, STIX does not; an own reader of the files says so.
    character = 0x04DD
    path = write_fonts(tmp_path, seed=0, characters=[character])
    used = {image.split("/")[1] for image in rows(path)[1]}
    cuts = [f for f in FONTS.glob("*.ttf") if f.stem.startswith(("DejaVuS", "STIXGeneral"))]
    having = {f.stem for f in cuts if character in TTFont(f).getBestCmap()}
    assert used == having
    assert used < {f.stem for f in cuts}


def test_characters_with_the_same_picture_everywhere_are_one_building(tmp_path: Path) -> None:
    # R and Lisu zha; the hyphens differ in one cut, E and its rotation in all.
    characters = [0x52, 0xA4E3, 0x2D, 0x2010, 0x45, 0x18E]
    buildings, _, _ = rows(write_fonts(tmp_path, seed=0, characters=characters))
    assert set(buildings) == {"U+0052", "U+002D", "U+2010", "U+0045", "U+018E"}


def test_a_third_character_joins_two_and_each_cut_still_draws_one_picture() -> None:
    digests = {
        0x41: {"a": b"1", "b": b"2", "c": b"3", "d": b"4", "e": b"x"},
        0x42: {"a": b"1", "b": b"2", "c": b"3", "d": b"4", "e": b"y", "f": b"6"},
        0x43: {"a": b"1", "b": b"2", "c": b"3", "d": b"4"},
        0x44: {"a": b"9", "b": b"8", "c": b"7", "d": b"6", "e": b"6"},
    }
    expected = [("a", 0x41), ("b", 0x41), ("c", 0x41), ("d", 0x41), ("e", 0x41), ("f", 0x42)]
    # The copy that cut e has of d's picture counts once.
    alone = [(cut, 0x44) for cut in "abc"]
    found = demo_data._buildings(digests)
    assert found[0x41] == expected
    assert found[0x44][:3] == alone
    assert len(found[0x44]) == 4
    assert set(found) == {0x41, 0x44}


def test_characters_without_a_picture_of_their_own_are_left_out(tmp_path: Path) -> None:
    # Space, no-break space, combining acute, braille, box drawing, private use, unassigned.
    characters = [0x20, 0xA0, 0x301, 0x2801, 0x2501, 0xE000, 0x378, 0x41]
    buildings, _, _ = rows(write_fonts(tmp_path, seed=0, characters=characters))
    assert set(buildings) == {"U+0041"}


def test_nothing_to_draw_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no character"):
        write_fonts(tmp_path, seed=0, characters=[0x301])
    assert list(tmp_path.iterdir()) == []


def font(cut: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        str(FONTS / f"{cut}.ttf"), demo_data.EM, layout_engine=ImageFont.Layout.BASIC
    )


def test_pictures_are_upright_centred_and_keep_size_and_height() -> None:
    def ink(text: str) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        picture = demo_data._draw(font("DejaVuSans"), ord(text))
        assert picture is not None
        return np.asarray(picture, float), picture.getbbox()

    pixels, (left, top, right, bottom) = ink("L")
    assert pixels[:, : (left + right) // 2].sum() > 2 * pixels[:, (left + right) // 2 :].sum()
    assert pixels[(top + bottom) // 2 :].sum() > 1.5 * pixels[: (top + bottom) // 2].sum()
    for text in "LoOW@":
        _, (left, _, right, _) = ink(text)
        assert abs(left + right - demo_data.CANVAS) <= 1
    assert ink("O")[0].sum() > 1.3 * ink("o")[0].sum()
    assert ink(",")[1][1] > ink("'")[1][3]


def test_a_picture_that_does_not_fit_is_left_out_rather_than_cut() -> None:
    per_ten_thousand, space = 0x2031, 0x20
    assert demo_data._draw(font("DejaVuSans"), per_ten_thousand) is None
    assert demo_data._draw(font("DejaVuSansMono"), per_ten_thousand) is not None
    assert demo_data._draw(font("DejaVuSans"), space) is None


def test_views_stay_close_to_the_straight_picture() -> None:
    picture = demo_data._draw(font("DejaVuSans"), ord("R"))
    assert picture is not None
    straight = describe(np.asarray(picture.reduce(demo_data.OVER))[None])[0]
    views = np.stack([demo_data._view(picture, str(key)) for key in range(50)])
    turned = describe(views)
    cosine = turned @ straight / np.linalg.norm(turned, axis=1) / np.linalg.norm(straight)
    assert cosine.min() > 0.7
    assert cosine.max() < 1
    assert len(np.unique(views, axis=0)) == 50


def slow_descriptor(picture: np.ndarray) -> np.ndarray:
    def at(y: int, x: int) -> float:
        return float(picture[y, x]) / 255 if 0 <= y < SIDE and 0 <= x < SIDE else 0.0

    out = np.zeros((DIRECTIONS, CELLS, CELLS))
    step = SIDE / CELLS
    for y in range(SIDE):
        for x in range(SIDE):
            right, down = at(y, x + 1) - at(y, x - 1), at(y + 1, x) - at(y - 1, x)
            for k in range(DIRECTIONS):
                angle = 2 * math.pi * k / DIRECTIONS
                edge = max(0.0, right * math.cos(angle) + down * math.sin(angle))
                for i in range(CELLS):
                    for j in range(CELLS):
                        away = abs(y + 0.5 - (i + 0.5) * step), abs(x + 0.5 - (j + 0.5) * step)
                        if max(away) < step:
                            window = (1 - away[0] / step) * (1 - away[1] / step)
                            out[k, i, j] += edge * window
    return np.sqrt(out).ravel()


def test_the_descriptor_agrees_with_its_definition_written_as_loops() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE), dtype=np.uint8)
    expected = np.stack([slow_descriptor(picture) for picture in pictures])
    np.testing.assert_allclose(describe(pictures), expected, rtol=1e-4, atol=1e-3)


def test_an_edge_answers_in_its_own_direction_and_place() -> None:
    picture = np.zeros((1, SIDE, SIDE), np.uint8)
    picture[:, :, SIDE // 2 :] = 255  # dark left, light right
    cells = describe(picture).reshape(DIRECTIONS, CELLS, CELLS)
    inner = cells[:, 2:-2, CELLS // 2]
    assert (inner[0] > inner[1]).all()
    assert (inner[1] > 0).all()
    assert (inner[DIRECTIONS // 2] == 0).all()
    assert (cells[0, :, :2] == 0).all()
    assert (describe(np.zeros((1, SIDE, SIDE), np.uint8)) == 0).all()


def test_held_out_letters_are_found_again_often_but_not_always(letters: Path) -> None:
    buildings, _, vectors = rows(letters)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -1)
    names = np.array(buildings)
    recall = float(np.mean(names[likeness.argmax(axis=1)] == names))
    assert 0.4 < recall < 0.9


@pytest.mark.parametrize("missing", ["matplotlib", "PIL"])
def test_without_the_plots_extra_the_error_says_what_to_install(
    tmp_path: Path, missing: str
) -> None:
    script = f"""
import sys
sys.modules[{missing!r}] = None
from pathlib import Path
from tripletkit.demo_data import write_fonts
from tripletkit.errors import ConfigError
try:
    write_fonts(Path(sys.argv[1]), seed=0)
except ConfigError as error:
    print(error.message, "|", error.hint)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert missing in done.stdout
    assert "pip install 'tripletkit[plots]'" in done.stdout
    assert list(tmp_path.iterdir()) == []
