"""Films for `benchmarks.quality`: how embeddings of them are judged, and what needs no network of ours.

Cold start: a fifth of the films, by a hash of their id, is cold, and no rating of theirs is learned from. A user is
the mean of the warm films that they liked. Attribute: genres are held out of the columns; do neighbors share them, and
can a linear model read them?
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch
from sklearn.metrics import roc_auc_score
from sklearn.utils.extmath import randomized_svd
from torch import nn
from torch.nn import functional

from benchmarks._inner import without_judged
from itemvec.plain import PlainEncoding
from itemvec.schema import FeatureSchema
from training.baselines import Cosines, dense_cosines, fitted, stacked, total_variance
from training.colditems import popularity_matched_auc, recall_and_ndcg
from training.folds import TEST, fold_of

COLD = 51 / 256
LIKED = 8
"""Of 10: ratings from here on are likes."""

WARM_LIKES = 5
COMMON = 100
"""Films that a genre needs to be probed for."""

DIMS = (16, 32, 64)
RIDGES = (10.0, 100.0, 1000.0)

SCHEMA = """
name: films
id: id
features:
  release_year: {kind: numeric}
  age_rating: {kind: nominal}
  runtime_minutes: {kind: numeric}
  genres: {kind: multi}
  directors: {kind: multi}
  writers: {kind: multi}
  cast: {kind: multi}
  languages: {kind: multi}
  countries: {kind: multi}
  studios: {kind: multi}
"""
"""What is known of a film before anybody has seen it: critics and box office know how popular it became."""

Floats = npt.NDArray[np.float32]
Figures = dict[str, float]


def schema(without: str | None = None, least: int | None = None) -> FeatureSchema:
    """`least` films have a label that counts; labels are as rare as the defaults allow where it is None."""
    found = FeatureSchema.from_yaml(SCHEMA)
    features = [f for f in found.features if f.name != without]
    if least is not None:
        features = [f.model_copy(update={"min_count": least}) if hasattr(f, "min_count") else f for f in features]
    return found.model_copy(update={"features": tuple(features)})


@dataclass(frozen=True)
class Films:
    """n films and who liked which."""

    table: pa.Table
    ids: list[str]
    likes: sp.csr_matrix
    """(users, n) of 1"""
    rated: npt.NDArray[np.bool_]
    """(n,) whether anybody rated it at all"""
    cold: npt.NDArray[np.bool_]
    """(n,)"""

    @classmethod
    def read(cls, data: Path, inner: bool = False) -> "Films":
        """All films; or with `inner` the warm ones alone, a fifth of which is cold instead."""
        table = pq.read_table(data / "movies.parquet", columns=["id", *(f.name for f in schema().features), "title"])
        if inner:
            table = without_judged(table, "id", COLD)
        ids = [str(i) for i in table.column("id").to_pylist()]
        ratings = all_ratings(data, inner)
        place = {item: row for row, item in enumerate(ids)}
        items = np.array([place[i] for i in ratings.column("item_id").to_pylist()])
        users = np.asarray(ratings.column("user_id").combine_chunks().dictionary_encode().indices)
        liked = ratings.column("rating").to_numpy() >= LIKED
        likes = sp.csr_matrix(
            (np.ones(liked.sum(), np.float32), (users[liked], items[liked])), (users.max() + 1, len(ids))
        )
        likes.data[:] = 1.0
        rated = np.bincount(items, minlength=len(ids)) > 0
        return cls(table, ids, likes, rated, fold_of(ids, COLD, 0.0) == TEST)


def all_ratings(data: Path, inner: bool) -> pa.Table:
    """Of the films that `Films.read` gives."""
    ratings = pq.read_table(data / "movie_ratings.parquet")
    return without_judged(ratings, "item_id", COLD) if inner else ratings


def warm_ratings(data: Path, inner: bool = False) -> pa.Table:
    """The ratings that may be learned from."""
    ratings = all_ratings(data, inner)
    cold = fold_of(ratings.column("item_id").to_pylist(), COLD, 0.0) == TEST
    return ratings.filter(pa.array(~cold))


class ColdStart:
    """Cold films ranked for users by their warm likes: of users with 5 of those and a cold one to find."""

    def __init__(self, films: Films) -> None:
        self.warm, self.cold = (np.flatnonzero(films.rated & side) for side in (~films.cold, films.cold))
        known = np.asarray(films.likes[:, self.warm].sum(1)).ravel() >= WARM_LIKES
        users = np.flatnonzero(known & (np.asarray(films.likes[:, self.cold].sum(1)).ravel() >= 1))
        profile = films.likes[users][:, self.warm]
        self.profile = (sp.diags(1 / np.asarray(profile.sum(1)).ravel()) @ profile).tocsr()
        self.liked = films.likes[users][:, self.cold].toarray() > 0
        self.popularity = np.asarray(films.likes[:, self.cold].sum(0)).ravel()

    def score(self, cosines: Cosines) -> Figures:
        scores = np.asarray(self.profile @ cosines(self.warm, self.cold), np.float32)
        recall, ndcg = recall_and_ndcg(scores, self.liked)
        return {
            "recall@20": recall,
            "NDCG@20": ndcg,
            "pmAUC": popularity_matched_auc(scores, self.liked, self.popularity),
        }


class Genres:
    """Of films that have genres: the mean Jaccard index of the genres of the 10 nearest, and the mean AUC of a ridge
    regression on the vectors that is fitted on the warm and asked of the cold."""

    def __init__(self, films: Films) -> None:
        genres = films.table.column("genres").to_pylist()
        self.rows = np.flatnonzero([bool(names) for names in genres])
        names, counts = np.unique([name for has in genres for name in has or ()], return_counts=True)
        common = names[counts >= COMMON]
        self.truth = np.array([[name in genres[row] for name in common] for row in self.rows], np.float32)
        self.cold = films.cold[self.rows]

    def score(self, cosines: Cosines, vectors: Floats | None = None) -> Figures:
        """`vectors` (n, dim) for the probe; without them it is left out."""
        figures = {"Jaccard@10": shared(cosines, self.rows, self.truth)}
        if vectors is not None:
            figures["probe AUC"] = self._probe(vectors[self.rows])
        return figures

    def _probe(self, vectors: Floats) -> float:
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        x = np.hstack([unit, np.ones((len(unit), 1))]).astype(np.float64)
        fit, ask = x[~self.cold], x[self.cold]
        weights = np.linalg.solve(fit.T @ fit + 1e-3 * np.eye(x.shape[1]), fit.T @ self.truth[~self.cold])
        return float(roc_auc_score(self.truth[self.cold] > 0, ask @ weights, average="macro"))


def shared(cosines: Cosines, rows: npt.NDArray[np.int64], truth: Floats, k: int = 10, at_once: int = 2048) -> float:
    """The mean Jaccard index of the labels `truth` (rows, labels) of an item and of each of its k nearest."""
    found = []
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        near = cosines(some, rows)
        near[np.arange(len(some)), np.arange(start, start + len(some))] = -np.inf
        nearest = np.argpartition(-near, k, axis=1)[:, :k]
        mine = truth[start : start + at_once, None]
        both, either = np.minimum(mine, truth[nearest]).sum(2), np.maximum(mine, truth[nearest]).sum(2)
        found.append((both / np.maximum(either, 1)).mean(1))
    return float(np.concatenate(found).mean())


# --- what an embedding has to beat ------------------------------------------------------------------------------------


def plain(films: Films, fit: npt.NDArray[np.bool_], without: str | None = None) -> Mapping[str, Any]:
    """Per column the one- or multi-hot encoding of all films, fitted on the films `fit`; labels of 5 films or more. To
    have no age rating is one too: most films that few have seen lack it."""
    place = films.table.column_names.index("age_rating")
    table = films.table.set_column(place, "age_rating", pc.fill_null(films.table.column(place), "none"))
    encoding = PlainEncoding.fit(table.filter(pa.array(fit)), schema(without, least=5), scale="standard")
    rows = encoding.matrix(table)
    wide = sp.csr_matrix((rows.data, rows.indices, rows.indptr), (len(films.ids), len(encoding.names)))
    column = np.array([name.partition("=")[0] for name in encoding.names])
    return {str(name): wide[:, column == name].tocsr() for name in dict.fromkeys(column)}


def cold_start_baselines(films: Films) -> Iterator[tuple[str, Figures]]:
    task = ColdStart(films)
    fit = films.rated & ~films.cold
    rows, blocks = np.flatnonzero(fit), plain(films, fit)
    for dim in DIMS:
        for name, cosines in fitted(blocks, rows, dim):
            if name != "one_hot" or dim == DIMS[0]:
                yield (named(name, dim), task.score(cosines))
    unit = centred(blocks, rows)
    for name, vectors in ridge_to_likes(unit, films.likes[:, rows], rows):
        yield name, task.score(dense_cosines(vectors))
    yield "contrastive tower 32, likes", task.score(dense_cosines(tower(stacked(blocks), films.likes[:, rows], rows)))


def attribute_baselines(films: Films) -> Iterator[tuple[str, Figures]]:
    """Fitted on all films: they have no genres to give away."""
    task = Genres(films)
    rows, blocks = task.rows, plain(films, np.isin(np.arange(len(films.ids)), task.rows), without="genres")
    yield named("one_hot", 0), task.score(next(fitted(blocks, rows, DIMS[0]))[1])
    for dim in DIMS:
        for name, vectors in reduced(blocks, rows, dim):
            yield named(name, dim), task.score(dense_cosines(vectors), vectors)


def named(kind: str, dim: int) -> str:
    return {
        "one_hot": "one-/multi-hot, centred",
        "hashing": f"hashing {dim}",
        "svd": f"SVD {dim}",
        "pca": f"PCA {dim}",
        "pca_unit_variance": f"PCA {dim} of unit-variance columns",
    }[kind]


def reduced(blocks: Mapping[str, Any], rows: npt.NDArray[np.int64], dim: int) -> Iterator[tuple[str, Floats]]:
    """(n, dim) coordinates by SVD, PCA, and PCA of unit-variance columns."""
    from sklearn.decomposition import PCA, TruncatedSVD  # noqa: PLC0415

    x = stacked(blocks)
    unit = stacked({name: block / max(total_variance(block[rows]), 1e-9) ** 0.5 for name, block in blocks.items()})
    yield "svd", TruncatedSVD(dim, random_state=0).fit(x[rows]).transform(x).astype(np.float32)
    for name, columns in (("pca", x), ("pca_unit_variance", unit)):
        pca = PCA(dim, svd_solver="arpack", random_state=0).fit(columns[rows])
        yield name, np.asarray(pca.transform(columns), np.float32)


def centred(blocks: Mapping[str, Any], rows: npt.NDArray[np.int64]) -> Floats:
    """(n, width) of unit-variance columns without the mean of `rows`."""
    unit = stacked({name: block / max(total_variance(block[rows]), 1e-9) ** 0.5 for name, block in blocks.items()})
    return np.asarray(unit.toarray() - unit[rows].mean(0), np.float32)


def ridge_to_likes(x: Floats, likes: sp.csr_matrix, rows: npt.NDArray[np.int64]) -> Iterator[tuple[str, Floats]]:
    """Columns mapped by ridge regression to the singular vectors of the likes (users, rows) of the films `rows`."""
    of_user, of_film = (np.maximum(np.asarray(likes.sum(axis)).ravel(), 1) for axis in (1, 0))
    scaled = sp.diags(of_user**-0.5) @ likes @ sp.diags(of_film**-0.5)
    fit = x[rows]
    inner = fit.T @ fit
    spaces = {}
    for dim in (32, 64):
        _, size, right = randomized_svd(scaled, dim, random_state=0, n_iter=4)
        spaces[dim] = right.T * np.sqrt(size)
    for ridge in RIDGES:
        wanted = fit.T @ np.hstack(list(spaces.values()))
        maps = np.linalg.solve(inner + ridge * np.eye(len(inner), dtype=np.float32), wanted)
        at = 0
        for dim in spaces:
            yield f"ridge {ridge:g} to SVD {dim} of likes", x @ maps[:, at : at + dim]
            at += dim


def tower(
    x: sp.csr_matrix, likes: sp.csr_matrix, rows: npt.NDArray[np.int64], dim: int = 32, steps: int = 3000
) -> Floats:
    """Two films that a user liked find each other by a network over the raw columns, as one would first write it:
    (n, dim). Popularity is corrected for, and nothing holds back rare labels."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    wide = nn.EmbeddingBag(x.shape[1], 128, mode="sum")
    net = nn.Sequential(nn.GELU(), nn.Dropout(0.2), nn.Linear(128, dim))
    optimizer = torch.optim.AdamW([*wide.parameters(), *net.parameters()], lr=2e-3, weight_decay=1e-3)

    def embed(items: npt.NDArray[np.int64]) -> torch.Tensor:
        some = x[items]
        bags = (torch.from_numpy(a.astype(np.int64)) for a in (some.indices, some.indptr[:-1]))
        return functional.normalize(net(wide(*bags, per_sample_weights=torch.from_numpy(some.data))), dim=1)

    liked = likes[np.flatnonzero(np.asarray(likes.sum(1)).ravel() >= 2)]
    count = np.diff(liked.indptr)
    weight = np.minimum(count, 50) / np.minimum(count, 50).sum()
    share = (np.asarray(likes.sum(0)).ravel() + 1) / (likes.nnz + likes.shape[1])
    log_q = torch.from_numpy(np.log(share)).float()
    for _ in range(steps):
        users = rng.choice(len(count), 512, p=weight)
        first = rng.integers(count[users])
        second = (first + 1 + rng.integers(count[users] - 1)) % count[users]
        one, other = (liked.indices[liked.indptr[users] + place] for place in (first, second))
        logits = embed(rows[one]) @ embed(rows[other]).T / 0.1 - log_q[other]
        same = torch.from_numpy(other[:, None] == other[None]).fill_diagonal_(False)
        loss = functional.cross_entropy(logits.masked_fill(same, -torch.inf), torch.arange(len(users)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.inference_mode():
        return embed(np.arange(x.shape[0])).numpy()


def write(path: Path, ids: list[str], vectors: Floats) -> None:
    """A Parquet file of `id` and `embedding`."""
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    pq.write_table(pa.table({"id": ids, "embedding": embedding.cast(pa.list_(pa.float32()))}), path)
