"""A picture of what training did: nearest images before and after, for some random queries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tripletkit.data.store import Store
from tripletkit.device import as_tensor
from tripletkit.fsio import atomic_write

QUERIES, NEAREST = 10, 8
RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_neighbors(path: Path, store: Store, projected: Tensor, *, seed: int) -> None:
    """Write a PNG: per row a query of the fonts data and its nearest images, raw and `projected`.

    `projected` [N, d] has the rows of `store`. The queries are drawn by `seed`, not chosen.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    queries = np.random.default_rng(seed).choice(len(store.building), QUERIES, replace=False)
    raw = _nearest(as_tensor(store.embeddings).float(), queries)
    trained = _nearest(projected.float().cpu(), queries)
    fonts = Path(mpl.get_data_path(), "fonts", "ttf")

    figure = Figure(figsize=(9, 0.55 * QUERIES + 0.6), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 2 * NEAREST + 3), ylim=(-QUERIES, 1.2))
    axes.axis("off")
    columns = [np.array([0.8]), 2.2 + np.arange(NEAREST), 3 + NEAREST + np.arange(NEAREST)]
    titles = ("query", "nearest raw embeddings", "nearest after training")
    for title, places in zip(titles, columns, strict=True):
        axes.text(places.mean(), 0.75, title, ha="center", va="center", size=11)
    for line, query in enumerate(queries):
        shown = zip(columns, ([query], raw[line], trained[line]), strict=True)
        for x, row in (
            (x, row) for places, rows in shown for x, row in zip(places, rows, strict=True)
        ):
            character, cut, _ = store.ids[int(row)].as_py().split("/")
            same = store.building[row] == store.building[query]
            axes.text(
                x, -line, chr(int(character[2:], 16)),
                font=FontProperties(fname=fonts / f"{cut}.ttf", size=19),
                color="black" if row == query else RIGHT if same else WRONG,
                ha="center", va="center_baseline",
            )  # fmt: skip
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _nearest(x: Tensor, queries: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the nearest images by cosine, the query itself left out; [QUERIES, NEAREST]."""
    x = F.normalize(x, dim=1)
    similarity = x[queries] @ x.T
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    nearest: NDArray[np.int64] = similarity.topk(NEAREST).indices.numpy()
    return nearest
