"""Interactions: which users liked which items, for the objective `co_engage` and for cold-start figures.

A second table with a row per like: user, item, and maybe how much. An item that a fold holds out is no anchor, and a
positive only of its own fold, so nothing that is learned has seen what users think of held-out items.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
import torch
from torch import Tensor

from itemvec.check import undictionaried
from itemvec.errors import TableError
from itemvec.table import batches
from training.config import InteractionsConfig
from training.folds import TRAIN
from training.items import is_csv

LOUDEST = 50
"""Likes of one user that count at most: who likes a thousand items does not decide for all."""


@dataclass(frozen=True, slots=True)
class Interactions:
    """u users, n items of the prepared table; the likes of items that the table does not have are left out."""

    likes: sp.csr_matrix
    """(u, n) of 1 where a user liked an item"""

    fold: npt.NDArray[np.int8]
    """(n,)"""

    _by_fold: dict[int, sp.csr_matrix] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def read(
        cls, url: str, config: InteractionsConfig, ids: pa.ChunkedArray | list[str], fold: npt.NDArray[np.int8]
    ) -> "Interactions":
        """`ids` (n,) of the prepared table's rows. The table of interactions is read piece by piece: what must fit in
        memory are likes. Raises TableError where nothing can be learned."""
        users, items = _likes(url, config)
        ids = pa.chunked_array([ids]) if isinstance(ids, list) else ids.cast(pa.string())
        row_of = pc.index_in(items.dictionary, value_set=ids).fill_null(-1).to_numpy()
        who, what = (np.asarray(column.indices.fill_null(-1)) for column in (users, items))
        there = (who >= 0) & (what >= 0)
        there[there] = row_of[what[there]] >= 0
        if not there.any():
            raise TableError(
                f"{url}: none of its {len(items):,} rows is a like of an item of the table (column {config.item!r}, "
                f"such as {', '.join(map(repr, items.dictionary[:2].to_pylist()))}; ids are such as {ids[0].as_py()!r})"
            )
        shape = (len(users.dictionary), len(ids))
        ones = np.ones(int(there.sum()), np.float32)
        likes = sp.csr_matrix((ones, (who[there], row_of[what[there]])), shape=shape)
        likes.data[:] = 1.0  # who rated an item twice likes it once
        return cls(likes, fold)

    @property
    def popularity(self) -> Tensor:
        """(n,) the share of the positives of `pairs` among the training rows that each item is; they add up to 1."""
        train = self._of(TRAIN)
        count = np.diff(train.indptr)
        each = np.where(count >= 2, _loudness(count) / np.maximum(count, 1), 0.0)
        share = np.asarray(train.T @ each).ravel()
        return torch.from_numpy(share / max(share.sum(), 1e-12)).float()

    def pairs(self, count: int, fold: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(count,) anchors of the training rows and (count,) positives of a fold, each liked by one and the same user;
        none where the fold has none."""
        train, other = self._of(TRAIN), self._of(fold)
        before, after = np.diff(train.indptr), np.diff(other.indptr)
        enough = (before >= 2) if fold == TRAIN else (before >= 1) & (after >= 1)
        if not enough.any():
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        user = _draw(np.where(enough, _loudness(after), 0.0), count, generator)
        one = _draw_below(before[user], generator)
        if fold == TRAIN:
            two = (one + 1 + _draw_below(before[user] - 1, generator)) % before[user]
        else:
            two = _draw_below(after[user], generator)
        return _rows(train, user, one), _rows(other, user, two)

    def histories(self, users: int, likes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(users, likes) training items that a user liked each, and (users,) one more of them; where the user liked
        fewer, some stand there twice. None where no user liked two."""
        train = self._of(TRAIN)
        count = np.diff(train.indptr)
        if not (count >= 2).any():
            return torch.zeros(0, likes, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        user = _draw(np.where(count >= 2, _loudness(count), 0.0), users, generator)
        next_one = _draw_below(count[user], generator)
        others = np.stack(
            [(next_one + 1 + _draw_below(count[user] - 1, generator)) % count[user] for _ in range(likes)], axis=1
        )
        flat = _rows(train, np.repeat(user, likes), others.ravel())
        return flat.view(users, likes), _rows(train, user, next_one)

    def save(self, path: Path) -> None:
        sp.save_npz(path, self.likes)

    @classmethod
    def open(cls, path: Path, fold: npt.NDArray[np.int8]) -> "Interactions | None":
        return cls(sp.load_npz(path).tocsr(), fold) if path.exists() else None

    def _of(self, fold: int) -> sp.csr_matrix:
        """(u, n) likes of the fold's items only."""
        if fold not in self._by_fold:
            kept = (self.likes @ sp.diags((self.fold == fold).astype(np.float32))).tocsr()
            kept.eliminate_zeros()
            self._by_fold[fold] = kept
        return self._by_fold[fold]


def _likes(url: str, config: InteractionsConfig) -> tuple[pa.DictionaryArray, pa.DictionaryArray]:
    """(m,) users and (m,) items, as text, of the rows that are likes."""
    names = [config.user, config.item, *([config.weight] if config.weight else [])]
    found: list[pa.Table] = []
    for batch in batches(url, names, dict.fromkeys(names[:2], pa.string()) if is_csv(url) else None):
        part = pa.Table.from_batches([batch])
        _require(part, config, url)
        if config.weight is not None and config.least is not None:
            part = part.filter(pc.greater_equal(part.column(config.weight), config.least))
        coded = [undictionaried(part.column(name)).cast(pa.string()).dictionary_encode() for name in names[:2]]
        found.append(pa.table(coded, ["user", "item"]))
    if not found:
        raise TableError(f"{url} has no rows")
    likes = pa.concat_tables(found).unify_dictionaries()
    if len(likes) == 0:
        raise TableError(f"{url}: no row has {config.weight!r} of at least {config.least:g} (interactions.least)")
    users, items = (likes.column(name).combine_chunks() for name in ("user", "item"))
    return users, items


def _require(part: pa.Table, config: InteractionsConfig, url: str) -> None:
    for setting, name in (("user", config.user), ("item", config.item), ("weight", config.weight)):
        if name is not None and name not in part.column_names:
            raise TableError(f"{url} has no column {name!r}: name the one that it has (interactions.{setting})")
    kind = pa.null() if config.weight is None else part.column(config.weight).type
    if not any(of(kind) for of in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)):
        raise TableError(f"{url}: column {config.weight!r} is {kind}, and a weight is a number (interactions.weight)")


def _loudness(likes: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    loudness: npt.NDArray[np.float64] = np.minimum(likes, LOUDEST).astype(np.float64)
    return loudness


def _draw(weight: npt.NDArray[np.float64], count: int, generator: torch.Generator) -> npt.NDArray[np.int64]:
    ends = np.cumsum(weight)
    place = torch.rand(count, generator=generator, dtype=torch.float64).numpy() * ends[-1]
    found: npt.NDArray[np.int64] = np.searchsorted(ends, place, side="right")
    return found


def _draw_below(bound: npt.NDArray[np.integer], generator: torch.Generator) -> npt.NDArray[np.int64]:
    share = torch.rand(len(bound), generator=generator, dtype=torch.float64).numpy()
    below: npt.NDArray[np.int64] = np.minimum((share * bound).astype(np.int64), bound - 1)
    return below


def _rows(likes: sp.csr_matrix, user: npt.NDArray[np.int64], place: npt.NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(likes.indices[likes.indptr[user] + place].astype(np.int64))
