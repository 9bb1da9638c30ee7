"""Nearest images, confused pairs and weakest buildings against plain loops, and at their edges."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import toy
from tests.test_retrieval import gaussian, labels, sign_vectors
from tripletkit.apply.confusion import confused_pairs, mistakes, nearest, weakest
from tripletkit.data.store import open_store, subsample
from tripletkit.train.retrieval import TIE, retrieve, summarize


def by_loops(embeddings, building, *, other=False):
    """The row of the nearest image of each, by the rules: one query at a time, in double precision."""
    x = embeddings.double().numpy()
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    building = building.numpy()
    found = []
    for query in range(len(x)):
        similarity = np.round(x @ x[query], 9)
        wrong = np.flatnonzero(building != building[query])
        right = np.flatnonzero(building == building[query])
        right = right[right != query]
        best = [similarity[rows].max(initial=-np.inf) for rows in (wrong, right)]
        rows = wrong if other or (len(wrong) and best[0] >= best[1] - TIE) else right
        near = rows[similarity[rows] >= similarity[rows].max(initial=-np.inf) - TIE]
        found.append(near.min() if len(near) else -1)
    return found


@given(
    codes=labels,
    dim=st.sampled_from([4, 16, 64]),
    flips=st.sampled_from([0.0, 0.1, 0.3, 0.5]),
    tile=st.integers(1, 40) | st.none(),
    other=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=80)
def test_nearest_is_that_of_a_plain_loop(codes, dim, flips, tile, other, seed):
    embeddings, building = sign_vectors(codes, dim, flips, seed)
    found = nearest(embeddings, building, other=other, tile=tile)
    assert found.row.tolist() == by_loops(embeddings, building, other=other)
    unit = torch.nn.functional.normalize(embeddings.double())
    there = found.row >= 0
    cosine = (unit * unit[found.row]).sum(1)
    np.testing.assert_allclose(found.similarity[there], cosine[there], atol=1e-6)
    assert (found.similarity[~there] == -torch.inf).all()


def test_the_tile_leaves_no_trace_even_among_doubles():
    embeddings, building = gaussian(np.random.default_rng(0).integers(60, size=500), noise=3.0)
    embeddings[100:140] = embeddings[100]
    for other in (False, True):
        whole = nearest(embeddings, building, other=other)
        for tile in (500, 128, 33):
            part = nearest(embeddings, building, other=other, tile=tile)
            assert torch.equal(part.row, whole.row)
            assert torch.equal(part.similarity, whole.similarity)


def test_half_precision_and_some_queries():
    embeddings, building = gaussian(np.random.default_rng(0).integers(60, size=300))
    embeddings = embeddings.half()
    asked = torch.tensor([250, 3, 77])
    found = nearest(embeddings, building, queries=asked)
    assert found.row.tolist() == nearest(embeddings.float(), building).row[asked].tolist()
    assert len(nearest(embeddings, building, queries=asked[:0]).row) == 0


def test_a_wrong_image_as_near_as_the_right_one_comes_first():
    x = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    building = torch.tensor([0, 0, 1, 2])
    assert nearest(x, building).row.tolist() == [2, 2, 0, 0]
    assert nearest(x[:2], building[:2], other=True).row.tolist() == [-1, -1]


def store_of(tmp_path, buildings, embeddings):
    """A store with these rows; building 3 is called "b3", row 12 "i12"."""
    table = pa.table(
        {
            "building_id": [f"b{code}" for code in buildings],
            "streetview_image_id": [f"i{row}" for row in range(len(buildings))],
            "embedding": toy.as_lists(np.asarray(embeddings, np.float32)),
        }
    )
    pq.write_table(table, tmp_path / "some.parquet")
    return open_store(tmp_path / "some.parquet", tmp_path / "cache")


def random_store(tmp_path, seed, singletons):
    random = np.random.default_rng(seed)
    building = np.concatenate([random.integers(12, size=90), np.arange(singletons) + 50])
    building = random.permutation(building)
    embeddings, codes = gaussian(building, dim=6, noise=1.5, seed=seed)
    return store_of(tmp_path, building, embeddings), embeddings, codes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("singletons", [0, 15])
def test_pairs_and_weakest_are_those_of_plain_loops(tmp_path, seed, singletons):
    store, embeddings, building = random_store(tmp_path, seed, singletons)
    ids = [f"b{code}" for code in building.tolist()]
    order = {text: place for place, text in reversed(list(enumerate(ids)))}  # first in the file
    sizes = Counter(ids)
    near = by_loops(embeddings, building)
    unit = torch.nn.functional.normalize(embeddings.double()).numpy()
    wrong = [q for q in range(len(ids)) if sizes[ids[q]] > 1 and ids[near[q]] != ids[q]]

    expected = {}
    for query in wrong:
        rows = sorted((query, near[query]), key=lambda row: order[ids[row]])
        cosine = float(unit[query] @ unit[near[query]])
        expected.setdefault((ids[rows[0]], ids[rows[1]]), []).append((cosine, rows))
    ranked = sorted(expected.items(), key=lambda item: (-len(item[1]), -max(item[1])[0]))
    pairs = confused_pairs(store, torch.arange(len(ids)), embeddings, 10)
    assert len(pairs) == 10
    for pair, ((one, two), found) in zip(pairs, ranked, strict=False):
        assert (pair.building, pair.other, pair.mistakes) == (one, two, len(found))
        cosine, rows = max(found)
        assert pair.similarity == pytest.approx(cosine, abs=1e-6)
        assert pair.images == tuple(f"i{row}" for row in rows)

    retrieval = retrieve(embeddings, building)
    assert len(wrong) / len(retrieval.query_rows) == pytest.approx(
        1 - summarize(retrieval, [1])["recall@1"]
    )
    precision = dict(
        zip(retrieval.query_rows.tolist(), retrieval.average_precision_at_r.tolist(), strict=True)
    )
    lines = []
    for text in set(ids):
        rows = [row for row in range(len(ids)) if ids[row] == text]
        missed = [row for row in rows if row in wrong]
        if missed:
            taken = Counter(ids[near[row]] for row in missed)
            often = min(taken, key=lambda name: (-taken[name], order[name]))
            recall = 1 - len(missed) / len(rows)
            mean = float(np.mean([precision[row] for row in rows]))
            lines.append((recall, mean, -len(rows), order[text], text, often))
    found = weakest(store, torch.arange(len(ids)), embeddings, retrieval, 8)
    for weak, (recall, mean, size, _, text, often) in zip(found, sorted(lines)[:8], strict=True):
        assert (weak.building, weak.images, weak.taken_for) == (text, -size, often)
        assert (weak.recall_at_1, weak.map_at_r) == pytest.approx((recall, mean))


def test_mistakes_with_and_without_the_retrieval_are_the_same(tmp_path):
    _, embeddings, building = random_store(tmp_path, 9, 15)
    alone = mistakes(embeddings, building)
    given_ranks = mistakes(embeddings, building, retrieve(embeddings, building))
    assert len(alone.query) > 10
    for one, other in zip(alone, given_ranks, strict=True):
        assert torch.equal(one, other)


def test_only_the_queries_that_were_asked_count(tmp_path):
    store, embeddings, building = random_store(tmp_path, 1, 15)
    retrieval = retrieve(embeddings, building, max_queries=40)
    found = mistakes(embeddings, building, retrieval)
    assert set(found.query.tolist()) < set(retrieval.query_rows.tolist())
    rows = torch.arange(len(building))
    weak = weakest(store, rows, embeddings, retrieval, 100, found=found)
    assert sum(each.queries * (1 - each.recall_at_1) for each in weak) == pytest.approx(
        len(found.query)
    )
    assert any(each.queries < each.images for each in weak)
    pairs = confused_pairs(store, rows, embeddings, 1000, found=found)
    assert sum(pair.mistakes for pair in pairs) == len(found.query)


def test_rows_of_a_sample_keep_their_names(tmp_path):
    store, embeddings, building = random_store(tmp_path, 2, 15)
    sample = subsample(store, buildings=8, seed=0)
    rows = np.sort(sample.by_building)
    part, codes = embeddings[rows], building[rows]
    pairs = confused_pairs(sample, rows, part, 5)
    kept = {f"b{code}" for code in codes.tolist()}
    assert pairs
    for pair in pairs:
        assert {pair.building, pair.other} <= kept
        assert [f"b{building[int(image[1:])]}" for image in pair.images] == [
            pair.building,
            pair.other,
        ]
    weak = weakest(sample, rows, part, retrieve(part, codes), 5)
    assert {each.building for each in weak} <= kept


def test_without_mistakes_there_is_nothing_to_list(tmp_path):
    building = [0, 0, 1, 1]
    embeddings = torch.eye(2)[building]
    store = store_of(tmp_path, building, embeddings)
    assert confused_pairs(store, torch.arange(4), embeddings, 5) == []
    retrieval = retrieve(embeddings, torch.tensor(building))
    assert weakest(store, torch.arange(4), embeddings, retrieval, 5) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("other", [False, True])
def test_a_gpu_finds_the_same(other):
    embeddings, building = gaussian(np.random.default_rng(0).integers(300, size=2000))
    embeddings[100:140] = embeddings[100]
    here = nearest(embeddings, building, other=other)
    for tile in (None, 333):
        there = nearest(embeddings.cuda(), building.cuda(), other=other, tile=tile)
        assert torch.equal(there.row, here.row)
        torch.testing.assert_close(there.similarity, here.similarity)
    found = mistakes(embeddings.cuda(), building.cuda(), retrieve(embeddings, building))
    assert torch.equal(found.query, mistakes(embeddings, building).query)
