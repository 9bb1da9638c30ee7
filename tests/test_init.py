"""The linear start of the head against slow references, and its cache."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from tests.worlds import make_store
from tripletkit.errors import DataError
from tripletkit.train import init
from tripletkit.train.init import LinearStart, linear_start
from tripletkit.train.retrieval import retrieve, summarize


def world(dim=12, buildings=60, images=300, nuisance=0.0, seed=0, dtype=np.float32, offset=3.0):
    """Codes and embeddings [images, dim] far from the origin; some buildings are singletons."""
    random = np.random.default_rng(seed)
    building = random.integers(buildings, size=images)
    building = np.unique(building, return_inverse=True)[1]
    x = random.standard_normal((building.max() + 1, dim))[building]
    x += 0.5 * random.standard_normal(x.shape) * np.geomspace(1, 3, dim)
    x += nuisance * random.standard_normal((images, 3)) @ random.standard_normal((3, dim))
    return building, (x + offset).astype(dtype)


def projected(start: LinearStart, x: np.ndarray) -> np.ndarray:
    y = x.astype(np.float64) @ start.weight.numpy().astype(np.float64).T
    return y + start.bias.numpy()


def same_span(a: np.ndarray, b: np.ndarray) -> float:
    """Largest angle between the row spaces of two matrices."""
    return float(scipy.linalg.subspace_angles(a.T.astype(np.float64), b.T).max())


def reference_lda(building, x, shrinkage):
    """All components, leading first, one per row, by the definition and a general eigensolver."""
    x = x.astype(np.float64)
    within, between = np.zeros((2, x.shape[1], x.shape[1]))
    for b in np.unique(building):
        mine = x[building == b]
        for row in mine:
            within += np.outer(row - mine.mean(0), row - mine.mean(0)) / len(x)
            between += np.outer(mine.mean(0) - x.mean(0), mine.mean(0) - x.mean(0)) / len(x)
    within += shrinkage * np.trace(within) / len(within) * np.eye(len(within))
    values, vectors = scipy.linalg.eig(between, within)
    return vectors.real[:, np.argsort(-values.real)].T


@pytest.mark.parametrize("block_rows", [1000, 40, 7])
def test_lda_equals_the_definition(tmp_path, monkeypatch, block_rows):
    building, x = world()
    monkeypatch.setattr(init, "BLOCK_BYTES", 8 * x.shape[1] * block_rows)
    start = linear_start(make_store(building, x), "lda", 4, tmp_path, seed=0)
    expected = reference_lda(building, x, init.SHRINKAGE)
    # Buildings here are small: none is larger than a block of 40.
    tolerance = 1e-4 if block_rows > 7 else 0.2
    assert same_span(start.weight.numpy(), expected[:4]) < tolerance
    for row, wanted in zip(start.weight.numpy(), expected, strict=False):
        cosine = abs(row @ wanted) / np.linalg.norm(row) / np.linalg.norm(wanted)
        assert cosine > 1 - tolerance


def test_lda_output_is_white_within_buildings(tmp_path, monkeypatch):
    monkeypatch.setattr(init, "SHRINKAGE", 0.0)
    building, x = world()
    start = linear_start(make_store(building, x), "lda", 12, tmp_path, seed=0)
    y = projected(start, x)
    means = np.stack([y[building == b].mean(0) for b in range(building.max() + 1)])
    within = np.cov((y - means[building]).T, bias=True)
    np.testing.assert_allclose(within, within[0, 0] * np.eye(12), atol=1e-4 * within[0, 0])


def test_lda_without_shrinkage_spans_what_sklearn_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(init, "SHRINKAGE", 0.0)
    building, x = world(images=600)
    start = linear_start(make_store(building, x), "lda", 5, tmp_path, seed=0)
    sklearn = LinearDiscriminantAnalysis(solver="eigen").fit(x.astype(np.float64), building)
    assert same_span(start.weight.numpy(), sklearn.scalings_[:, :5].T) < 1e-4


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_pca_spans_what_sklearn_finds(tmp_path, dtype):
    building, x = world(dtype=dtype)
    start = linear_start(make_store(building, x), "pca", 5, tmp_path, seed=0)
    sklearn = PCA(5).fit(x.astype(np.float64))
    assert same_span(start.weight.numpy(), sklearn.components_) < 1e-4
    scaled = sklearn.transform(x.astype(np.float64))
    scaled /= np.linalg.norm(scaled, axis=1).mean()
    np.testing.assert_allclose(np.abs(projected(start, x)), np.abs(scaled), atol=1e-4)


@pytest.mark.parametrize("kind", ["lda", "pca"])
@pytest.mark.parametrize("output_dim", [1, 5, 12, 20])
def test_outputs_have_mean_zero_and_mean_norm_one(tmp_path, kind, output_dim):
    building, x = world()
    start = linear_start(make_store(building, x), kind, output_dim, tmp_path, seed=0)
    assert start.weight.shape == (output_dim, 12)
    assert start.bias.shape == (output_dim,)
    assert start.weight.dtype == start.bias.dtype == torch.float32
    y = projected(start, x)
    assert np.abs(y.mean(0)).max() < 1e-5
    assert np.linalg.norm(y, axis=1).mean() == pytest.approx(1, abs=1e-5)


def test_lda_finds_buildings_that_the_raw_embeddings_hide(tmp_path):
    building, x = world(dim=32, buildings=200, images=1000, nuisance=1.0)
    unseen = np.isin(building, np.unique(building)[::2])
    half = make_store(np.where(unseen, -1, building), x, "half")
    learned = linear_start(half, "lda", 16, tmp_path, seed=0)

    def recall(embeddings):
        codes = torch.from_numpy(building[unseen])
        return summarize(retrieve(torch.from_numpy(embeddings), codes), [1])["recall@1"]

    assert recall(projected(learned, x[unseen]).astype(np.float32)) > 2 * recall(x[unseen])


def test_signs_are_fixed_by_the_largest_coefficient(tmp_path):
    building, x = world()
    for kind in ("lda", "pca"):
        start = linear_start(make_store(building, x), kind, 12, tmp_path, seed=0)
        largest = start.weight.gather(1, start.weight.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()


def test_dimensions_beyond_the_input_are_zero(tmp_path):
    building, x = world()
    narrow = linear_start(make_store(building, x), "lda", 12, tmp_path, seed=0)
    wide = linear_start(make_store(building, x), "lda", 20, tmp_path, seed=0)
    assert torch.equal(wide.weight[:12], narrow.weight)
    assert torch.equal(wide.bias[:12], narrow.bias)
    assert not wide.weight[12:].any()
    assert not wide.bias[12:].any()


@pytest.mark.parametrize("kind", ["lda", "pca"])
def test_dimensions_beyond_the_rank_are_zero(tmp_path, kind):
    building, x = world(dim=4, offset=0.0)
    x = np.concatenate([x, np.zeros_like(x)], axis=1)  # rank 4 of 8
    start = linear_start(make_store(building, x), kind, 8, tmp_path, seed=0)
    assert start.weight[:4].any(dim=1).all()
    assert not start.weight[4:].any()
    assert np.linalg.norm(projected(start, x), axis=1).mean() == pytest.approx(1, abs=1e-5)


def test_fewer_images_than_dimensions_are_enough(tmp_path):
    building, x = world(dim=64, buildings=6, images=20)
    start = linear_start(make_store(building, x), "lda", 32, tmp_path, seed=0)
    assert torch.isfinite(start.weight).all()
    assert np.linalg.norm(projected(start, x), axis=1).mean() == pytest.approx(1, abs=1e-5)


def test_lda_without_differences_within_buildings_is_pca(tmp_path):
    building, x = world()
    x = x[np.unique(building, return_index=True)[1]][building]  # one embedding per building
    store = make_store(building, x)
    lda = linear_start(store, "lda", 3, tmp_path, seed=0)
    pca = linear_start(store, "pca", 3, tmp_path, seed=0)
    assert same_span(lda.weight.numpy(), pca.weight.numpy().astype(np.float64)) < 1e-4


def test_embeddings_that_are_all_the_same_are_refused(tmp_path):
    store = make_store(np.arange(300) // 3, np.full((300, 3), 0.1, np.float32))
    with pytest.raises(DataError, match="the 192 embeddings looked at are all the same"):
        linear_start(store, "lda", 2, tmp_path, seed=0)
    assert not list(tmp_path.glob("init-*"))


def test_the_cache_gives_the_same_bits_without_reading_the_embeddings(tmp_path):
    building, x = world()
    first = linear_start(make_store(building, x), "lda", 6, tmp_path, seed=0)
    gone = make_store(building, np.full_like(x, np.nan))  # same fingerprint
    again = linear_start(gone, "lda", 6, tmp_path, seed=0)
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    other_width = linear_start(gone, "lda", 3, tmp_path, seed=0)
    assert np.isfinite(other_width.weight.numpy()).all()


def test_the_result_does_not_depend_on_the_folder_or_the_run(tmp_path):
    building, x = world()
    one = linear_start(make_store(building, x), "lda", 6, tmp_path / "one", seed=0)
    two = linear_start(make_store(building, x), "lda", 6, tmp_path / "two", seed=0)
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


def test_what_differs_has_its_own_cache(tmp_path):
    building, x = world()
    sample = np.where(building % 2, building, -1)
    for kind in ("lda", "pca"):
        linear_start(make_store(building, x), kind, 4, tmp_path, seed=0)
        linear_start(make_store(building, x, "other"), kind, 4, tmp_path, seed=0)
        linear_start(make_store(sample, x), kind, 4, tmp_path, seed=0)
    assert len(list(tmp_path.glob("init-*"))) == 6


def test_a_damaged_cache_is_built_again(tmp_path):
    building, x = world()
    first = linear_start(make_store(building, x), "lda", 6, tmp_path, seed=0)
    (basis,) = tmp_path.glob("init-*/basis.f32")
    basis.write_bytes(basis.read_bytes()[:-4])
    again = linear_start(make_store(building, x), "lda", 6, tmp_path, seed=0)
    assert torch.equal(first.weight, again.weight)


def test_rows_left_out_of_a_sample_do_not_count(tmp_path):
    building, x = world()
    sample = np.where(building < 30, building, -1)
    expected = linear_start(
        make_store(building[sample >= 0], x[sample >= 0], "part"), "lda", 6, tmp_path, seed=0
    )
    start = linear_start(make_store(sample, x), "lda", 6, tmp_path, seed=0)
    assert torch.equal(start.weight, expected.weight)


def test_big_data_is_sampled_by_whole_buildings(tmp_path, monkeypatch):
    building, x = world(dim=4, buildings=200, images=1500)
    store = make_store(building, x)
    chosen = init._choose_buildings(store, seed=1)
    images = np.isin(building, chosen).sum()
    enough = init.IMAGES_PER_DIM * 4
    assert enough <= images < enough + np.bincount(building).max()
    assert np.array_equal(chosen, init._choose_buildings(store, seed=1))
    assert not np.array_equal(chosen, init._choose_buildings(store, seed=2))

    sampled = linear_start(store, "lda", 3, tmp_path, seed=1)
    only = make_store(np.where(np.isin(building, chosen), building, -1), x, "only")
    monkeypatch.setattr(init, "IMAGES_PER_DIM", 10_000)
    assert torch.equal(sampled.weight, linear_start(only, "lda", 3, tmp_path, seed=1).weight)
    whole = linear_start(store, "lda", 3, tmp_path, seed=1)
    assert not torch.equal(sampled.weight, whole.weight)


def test_lda_without_differences_between_buildings_is_pca(tmp_path):
    random = np.random.default_rng(0)
    half = random.normal(size=(30, 6)).astype(np.float32)
    x = np.concatenate([half, -half])  # every building has its mean at 0
    building = np.tile(np.arange(30), 2)
    starts = [
        linear_start(make_store(building, x), kind, 3, tmp_path, seed=0) for kind in ("lda", "pca")
    ]
    assert torch.equal(starts[0].weight, starts[1].weight)
    assert torch.isfinite(starts[0].weight).all()
