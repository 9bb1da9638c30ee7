"""Retrieval metrics against a full sort, against another library, and at their edges."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from tripletkit.errors import DataError, RunError
from tripletkit.train.retrieval import TIE, Retrieval, merge, retrieve, summarize

PER_QUERY = ("first_hit_rank", "average_precision_at_r", "r_precision")


def sign_vectors(building, dim=64, flips=0.3, seed=0):
    """Vectors of +1 and -1: their products are exact in any order, and ties are common."""
    random = np.random.default_rng(seed)
    building = np.asarray(building)
    signs = random.choice([-1.0, 1.0], (building.max() + 1, dim))[building]
    signs[random.random(signs.shape) < flips] *= -1
    return torch.from_numpy(signs).float(), torch.from_numpy(building)


def gaussian(building, dim=32, noise=2.0, seed=0):
    random = np.random.default_rng(seed)
    building = np.asarray(building)
    centers = random.standard_normal((building.max() + 1, dim))
    x = centers[building] + noise * random.standard_normal((len(building), dim))
    return torch.from_numpy(x).float(), torch.from_numpy(building)


def by_sorting(embeddings, building):
    """The definitions, one query at a time: row, first hit's rank, MAP@R, R-precision."""
    x = embeddings.double().numpy()
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    building = building.numpy()
    rows = []
    for query in range(len(x)):
        others = np.delete(np.arange(len(x)), query)
        same = building[others] == building[query]
        if not same.any():
            continue
        similarity = np.round(x[others] @ x[query], 9)
        ranked = same[np.lexsort((same, -similarity))]  # negatives first among equals
        relevant = int(same.sum())
        top = ranked[:relevant]
        precision = np.cumsum(top) / np.arange(1, relevant + 1)
        rows.append(
            (query, 1 + int(ranked.argmax()), (precision * top).sum() / relevant, top.mean())
        )
    return [np.array(column) for column in zip(*rows, strict=True)]


def assert_equal(result: Retrieval, expected):
    rows, first, precision, r_precision = expected
    assert result.query_rows.tolist() == rows.tolist()
    assert result.first_hit_rank.tolist() == first.tolist()
    np.testing.assert_allclose(result.average_precision_at_r, precision, rtol=1e-12)
    np.testing.assert_allclose(result.r_precision, r_precision, rtol=1e-12)


def assert_same(one: Retrieval, other: Retrieval):
    for field in dataclasses.fields(Retrieval):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), field.name


labels = st.one_of(
    st.lists(st.integers(0, 12), min_size=2, max_size=60),
    st.lists(st.integers(0, 200), min_size=2, max_size=60),
    st.lists(st.sampled_from([0, 0, 0, 0, 1, 2, 3]), min_size=2, max_size=150),
).filter(lambda codes: len(set(codes)) < len(codes))


@given(
    codes=labels,
    dim=st.sampled_from([4, 16, 64]),
    flips=st.sampled_from([0.0, 0.1, 0.3, 0.5]),
    tile=st.integers(1, 40) | st.none(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=150)
def test_equals_a_full_sort_that_puts_tied_negatives_first(codes, dim, flips, tile, seed):
    embeddings, building = sign_vectors(codes, dim, flips, seed)
    expected = by_sorting(embeddings, building)
    assert_equal(retrieve(embeddings, building, tile=tile), expected)


@pytest.mark.parametrize("flips", [0.1, 0.3, 0.45])
@pytest.mark.parametrize("images", [3, 40, 300])
def test_equals_a_full_sort_for_small_and_big_buildings(images, flips):
    random = np.random.default_rng(1)
    embeddings, building = sign_vectors(random.integers(max(2, 700 // images), size=700), 64, flips)
    expected = by_sorting(embeddings, building)
    for tile in (None, 700, 64, 33):
        assert_equal(retrieve(embeddings, building, tile=tile), expected)


@pytest.mark.parametrize("noise", [0.5, 2.0, 10.0])
def test_does_not_depend_on_the_tile(noise):
    building = np.random.default_rng(2).integers(90, size=400)
    embeddings, codes = gaussian(building, noise=noise)
    whole = retrieve(embeddings, codes)
    assert_equal(whole, by_sorting(embeddings, codes))
    for tile in (400, 128, 50, 16):
        assert_same(retrieve(embeddings, codes, tile=tile), whole)


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_agrees_with_pytorch_metric_learning(noise):
    building = np.random.default_rng(3).integers(40, size=150)
    embeddings, codes = gaussian(building, noise=noise)
    calculator = AccuracyCalculator(
        include=(
            "mean_average_precision_at_r", "r_precision", "precision_at_1", "mean_reciprocal_rank",
        ),
        k=len(codes) - 1,
        knn_func=CustomKNN(CosineSimilarity()),
    )  # fmt: skip
    theirs = calculator.get_accuracy(embeddings, codes)
    ours = summarize(retrieve(embeddings, codes), [1])
    assert ours["map@r"] == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)
    assert ours["r_precision"] == pytest.approx(theirs["r_precision"], abs=1e-6)
    assert ours["recall@1"] == pytest.approx(theirs["precision_at_1"], abs=1e-6)
    assert ours["mrr"] == pytest.approx(theirs["mean_reciprocal_rank"], abs=1e-6)


@given(
    codes=labels,
    noise=st.sampled_from([0.5, 3.0]),
    tile=st.integers(1, 40) | st.none(),
    parts=st.integers(2, 5),
    limit=st.integers(0, 60),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_merged_shares_are_the_whole_bit_for_bit(codes, noise, tile, parts, limit, seed):
    embeddings, building = gaussian(codes, noise=noise, seed=seed)
    options = {"tile": tile, "max_queries": limit, "seed": seed}
    shares = [retrieve(embeddings, building, **options, share=(i, parts)) for i in range(parts)]
    whole = retrieve(embeddings, building, **options)
    assert_same(merge(shares), whole)
    assert_same(merge(shares[::-1]), whole)
    assert {share.singletons for share in shares} == {whole.singletons}


def test_shares_are_about_as_large():
    embeddings, building = gaussian(np.random.default_rng(8).integers(100, size=1000))
    shares = [retrieve(embeddings, building, tile=50, share=(i, 3)) for i in range(3)]
    sizes = [len(share.query_rows) for share in shares]
    assert sum(sizes) == len(retrieve(embeddings, building).query_rows)
    assert max(sizes) - min(sizes) <= 50


def test_with_more_shares_than_tiles_some_are_empty():
    embeddings, building = gaussian([0, 0, 0, 1, 1, 2])
    shares = [retrieve(embeddings, building, tile=3, share=(i, 4)) for i in range(4)]
    assert [len(share.query_rows) for share in shares] == [3, 2, 0, 0]
    assert_same(merge(shares), retrieve(embeddings, building))


def test_identical_embeddings_put_every_negative_first():
    building = torch.tensor([0, 0, 0, 1, 1, 2])
    result = retrieve(torch.ones(6, 5), building)
    assert result.query_rows.tolist() == [0, 1, 2, 3, 4]
    assert result.first_hit_rank.tolist() == [4, 4, 4, 5, 5]
    assert result.average_precision_at_r.tolist() == [0.0] * 5
    assert result.singletons == 1


@pytest.mark.parametrize(("gap", "rank"), [(0.5 * TIE, 2), (3 * TIE, 1)])
def test_a_negative_within_rounding_of_the_positive_counts_as_tied(gap, rank):
    def at(cosine):
        return [cosine, (1 - cosine**2) ** 0.5]

    embeddings = torch.tensor([[1.0, 0.0], at(0.6), at(0.6 - gap)])
    result = retrieve(embeddings, torch.tensor([7, 7, 9]))
    assert result.first_hit_rank[0] == rank


def test_duplicates_of_the_query_are_not_the_query_itself():
    """Self is left out by row: an identical image of the building is a hit."""
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    result = retrieve(embeddings, torch.tensor([0, 0, 1, 2]))
    assert result.first_hit_rank.tolist() == [1, 1]


def test_one_building_is_found_whatever_its_embeddings():
    embeddings, building = gaussian([0] * 50)
    metrics = summarize(retrieve(embeddings, building), [1, 10])
    assert metrics == {
        "recall@1": 1.0, "recall@10": 1.0, "map@r": 1.0, "mrr": 1.0, "r_precision": 1.0,
        "queries": 50.0,
    }  # fmt: skip


def test_length_order_codes_and_dtype_do_not_matter():
    embeddings, building = sign_vectors(np.random.default_rng(4).integers(30, size=200))
    expected = retrieve(embeddings, building)
    length = 2.0 ** torch.arange(200).remainder(9)[:, None] / 16
    assert_same(retrieve(embeddings * length, building * 1000 + 5), expected)
    assert_same(retrieve(embeddings.half(), building.int()), expected)

    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    result = retrieve(embeddings[shuffled], building[shuffled])
    back = torch.full((200,), -1)
    back[expected.query_rows] = torch.arange(len(expected.query_rows))
    for name in PER_QUERY:
        there = getattr(expected, name)[back[shuffled[result.query_rows]]]
        assert torch.equal(getattr(result, name), there)


def test_the_input_is_not_changed():
    embeddings, building = gaussian([0, 0, 1, 1])
    before = embeddings.clone()
    retrieve(embeddings, building)
    assert torch.equal(embeddings, before)


def test_a_subset_of_queries_searches_the_whole_gallery():
    embeddings, building = sign_vectors(np.random.default_rng(5).integers(150, size=500))
    everything = retrieve(embeddings, building)
    some = retrieve(embeddings, building, max_queries=60, seed=3)
    assert len(some.query_rows) == 60
    assert some.query_rows.tolist() == sorted(set(some.query_rows.tolist()))
    place = torch.searchsorted(everything.query_rows, some.query_rows)
    assert torch.equal(everything.query_rows[place], some.query_rows)
    for name in PER_QUERY:
        assert torch.equal(getattr(some, name), getattr(everything, name)[place])
    assert some.singletons == everything.singletons == 500 - len(everything.query_rows)


def test_a_subset_of_queries_is_drawn_by_the_seed():
    embeddings, building = sign_vectors(np.random.default_rng(6).integers(100, size=400))

    def drawn(limit, seed):
        result = retrieve(embeddings, building, max_queries=limit, seed=seed)
        return set(result.query_rows.tolist())

    assert drawn(50, 1) == drawn(50, 1) != drawn(50, 2)
    assert drawn(50, 1) < drawn(120, 1)
    assert drawn(10_000, 1) == drawn(0, 1)


def test_recall_counts_queries_with_any_hit_among_the_k_nearest():
    result = Retrieval(
        query_rows=torch.arange(4),
        first_hit_rank=torch.tensor([1, 2, 5, 40]),
        average_precision_at_r=torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64),
        r_precision=torch.tensor([1.0, 0.5, 0.5, 0.0], dtype=torch.float64),
        singletons=0,
    )
    assert summarize(result, [5, 1, 1000]) == {
        "recall@5": 0.75,
        "recall@1": 0.25,
        "recall@1000": 1.0,
        "map@r": 0.375,
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 40) / 4),
        "r_precision": 0.5,
        "queries": 4.0,
    }


def test_k_beyond_the_gallery_keeps_its_name():
    embeddings, building = gaussian([0, 0, 1, 1, 2])
    metrics = summarize(retrieve(embeddings, building), [4, 100_000])
    assert metrics["recall@4"] == metrics["recall@100000"] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_head_that_diverged_gets_no_score(value):
    embeddings, building = gaussian([0, 0, 1, 1, 2])
    embeddings[3] = value
    with pytest.raises(RunError, match=r"1 of 5 .*first rows: \[3\]"):
        retrieve(embeddings, building)


def test_a_collapsed_head_finds_nothing():
    result = retrieve(torch.zeros(6, 3), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert result.first_hit_rank.tolist() == [5] * 6


def test_without_pairs_there_is_nothing_to_retrieve():
    with pytest.raises(DataError, match="none of the 3 buildings has two images"):
        retrieve(torch.eye(3), torch.arange(3))


def test_products_are_in_full_precision_whatever_the_trainer_uses():
    building = np.random.default_rng(7).integers(60, size=300)
    embeddings, codes = gaussian(building, dim=64)
    expected = retrieve(embeddings, codes)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(retrieve(embeddings, codes), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
