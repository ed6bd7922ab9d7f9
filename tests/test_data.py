import numpy as np
import pyarrow as pa
import pytest
import torch
from films import SCHEMA, table

from itemvec.errors import SchemaMismatch, TableError
from itemvec.features import MISSING, OOV, FeatureTransform
from itemvec.schema import FeatureSchema
from training.config import CorruptionConfig, TrainConfig
from training.data import EncodedTable, Marginals, Prepared, corrupt
from training.folds import TEST, TRAIN, VALIDATION, fold_of

NOTHING = CorruptionConfig(whole=0, swap=0, mask=0, thin=0, unseen=0)


@pytest.fixture(scope="module")
def transform() -> FeatureTransform:
    return FeatureTransform.fit(table(), SCHEMA)


@pytest.fixture(scope="module")
def encoded(transform: FeatureTransform) -> EncodedTable:
    return EncodedTable.of(transform.transform_table(table()), transform.layout)


def bags(batch, row: int) -> list[list[int]]:
    """The rows of each bag of one item."""
    _, indices, _, lengths = batch
    ends = lengths.reshape(-1).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    width = lengths.shape[1]
    return [indices[starts[i] : ends[i]].tolist() for i in range(row * width, (row + 1) * width)]


def test_a_row_keeps_its_fold_in_every_version_of_the_table():
    ids = [f"tt{i:07d}" for i in range(5000)]
    before = dict(zip(ids, fold_of(ids, 0.1, 0.05), strict=True))
    after = dict(zip(ids[::-3], fold_of(ids[::-3], 0.1, 0.05), strict=True))
    assert all(before[i] == fold for i, fold in after.items())
    shares = np.bincount(list(before.values()), minlength=3) / len(ids)
    assert shares == pytest.approx([0.85, 0.05, 0.10], abs=0.015)


def test_a_smaller_test_fold_lies_within_a_larger_one():
    ids = [str(i) for i in range(1000)]
    assert set(np.flatnonzero(fold_of(ids, 0.1, 0.1) == TEST)) < set(np.flatnonzero(fold_of(ids, 0.2, 0.1) == TEST))


def test_a_clean_batch_is_what_the_transform_made(transform, encoded):
    items = torch.tensor([5, 0, 17])
    batch = transform.transform_table(table().take(pa.array(items.numpy())))
    for ours, theirs in zip(
        encoded.clean(items), (batch.dense, batch.indices, batch.weights, batch.lengths), strict=True
    ):
        assert torch.equal(ours, torch.from_numpy(theirs).to(ours.dtype))


def test_many_items_are_gathered_part_by_part(encoded):
    """240 items 20 times are more than the 2,048 of a part."""
    once, often = encoded.clean(torch.arange(240)), encoded.clean(torch.arange(240).repeat(20))
    assert all(torch.equal(torch.cat([a] * 20), b) for a, b in zip(once, often, strict=True))


def test_each_column_comes_from_the_item_that_is_named_for_it(encoded):
    width = encoded.bag_count
    source = torch.full((1, width), 3)
    source[0, 1] = 8
    dense = torch.full((1, encoded.dense_slots), 3)
    dense[0, 0] = 8
    mixed = encoded.gather(source, dense)
    three, eight = encoded.clean(torch.tensor([3])), encoded.clean(torch.tensor([8]))
    for f in range(width):
        assert bags(mixed, 0)[f] == bags(eight if f == 1 else three, 0)[f]
    first = encoded.slot_of_dense == 0
    assert torch.equal(mixed[0][:, first], eight[0][:, first])
    assert torch.equal(mixed[0][:, ~first], three[0][:, ~first])


def test_the_two_made_up_items_are_what_the_transform_makes_of_nothing_and_of_the_unseen(transform, encoded):
    nothing = transform.transform([{}]).batch
    ours = encoded.clean(torch.tensor([encoded.all_missing]))
    for mine, theirs in zip(ours, (nothing.dense, nothing.indices, nothing.weights, nothing.lengths), strict=True):
        assert torch.equal(mine, torch.from_numpy(theirs).to(mine.dtype))
    unseen = transform.transform([{"provider": "?", "genres": ["?"], "cast": ["?", "!"], "rating": "?"}]).batch
    ours = encoded.clean(torch.tensor([encoded.all_unseen]))
    for mine, theirs in zip(ours, (unseen.dense, unseen.indices, unseen.weights, unseen.lengths), strict=True):
        assert torch.equal(mine, torch.from_numpy(theirs).to(mine.dtype))


def test_without_noise_nothing_is_damaged(transform, encoded):
    items = torch.arange(20)
    damaged = corrupt(encoded, items, items, NOTHING, transform.layout, torch.Generator())
    for ours, clean in zip(damaged, encoded.clean(items), strict=True):
        assert torch.equal(ours, clean)


def test_swapped_and_masked_columns_are_as_frequent_as_asked(transform, encoded):
    how = CorruptionConfig(whole=0, swap=0.0, mask=0.5, thin=0, unseen=0)
    items = torch.arange(200)
    damaged = corrupt(encoded, items, items, how, transform.layout, torch.Generator().manual_seed(0))
    missing = torch.tensor([slot.base + MISSING for slot in transform.layout.bags])
    share = torch.isin(damaged[1], missing).sum() / damaged[3].numel()
    assert share.item() == pytest.approx(0.5 + 0.5 * 0.1, abs=0.05)  # and a tenth was missing before


def test_a_share_of_the_items_stays_whole(transform, encoded):
    how = CorruptionConfig(whole=0.3, swap=0, mask=0.8, thin=0.5, unseen=0.1)
    items = torch.arange(200)
    damaged = corrupt(encoded, items, items, how, transform.layout, torch.Generator().manual_seed(0))
    clean = encoded.clean(items)
    same = [bags(damaged, i) == bags(clean, i) for i in range(200)]
    assert sum(same) / 200 == pytest.approx(0.3, abs=0.1)


def test_what_is_left_of_a_set_weighs_what_serving_would_give_it(transform, encoded):
    """m distinct rows of a set weigh 1/sqrt(m) each, and unseen labels are one row, however many they are."""
    how = CorruptionConfig(whole=0, swap=0, mask=0, thin=0.4, unseen=0.4)
    items = torch.arange(200)
    _, indices, weights, lengths = corrupt(
        encoded, items, items, how, transform.layout, torch.Generator().manual_seed(1)
    )
    ends = lengths.reshape(-1).cumsum(0)
    multi = {f for f, slot in enumerate(transform.layout.bags) if slot.kind == "multi"}
    seen_unseen = False
    for bag, end in enumerate(ends.tolist()):
        if bag % encoded.bag_count in multi:
            start = end - int(lengths.reshape(-1)[bag])
            kept = weights[start:end] > 0
            rows = indices[start:end][kept].tolist()
            assert len(rows) == len(set(rows)) >= 1
            assert weights[start:end][kept].tolist() == pytest.approx([len(rows) ** -0.5] * len(rows))
            base = transform.layout.bags[bag % encoded.bag_count].base
            seen_unseen |= base + OOV in rows and len(rows) > 1
    assert seen_unseen


def test_noise_repeats_with_its_seed(transform, encoded):
    items = torch.arange(50)

    def once(seed):
        return corrupt(encoded, items, items, CorruptionConfig(), transform.layout, torch.Generator().manual_seed(seed))

    assert all(torch.equal(a, b) for a, b in zip(once(3), once(3), strict=True))
    assert len(once(3)[1]) != len(once(4)[1]) or not torch.equal(once(3)[1], once(4)[1])


def test_marginals_count_the_training_items_that_have_each_row(transform, encoded):
    marginals = Marginals.of(encoded, torch.arange(240), transform.layout)
    provider = next(slot for slot in transform.layout.bags if slot.name == "provider")
    column = table().column("provider").to_pylist()
    vocabulary = transform.column("provider").vocabulary
    for label in ("Hulu", "Netflix"):
        assert marginals.count[provider.base + vocabulary.row(label)] == column.count(label)
    assert marginals.count[provider.base + MISSING] == column.count(None)
    some = Marginals.of(encoded, torch.tensor([3, 5, 100]), transform.layout, chunk=64)
    _, indices, _, _ = encoded.clean(torch.tensor([3, 5, 100]))
    assert torch.equal(some.count, torch.bincount(indices, minlength=transform.layout.table_rows).float())


def test_a_prepared_table_is_the_same_when_it_is_opened(tmp_path):
    made = Prepared.make(table(), SCHEMA, TrainConfig(), tmp_path)
    opened = Prepared.open(tmp_path)
    assert made.layout == opened.layout and made.transform.digest() == opened.transform.digest()
    assert torch.equal(made.table.rows, opened.table.rows) and torch.equal(made.marginals.count, opened.marginals.count)
    assert [len(opened.items(fold)) for fold in (TRAIN, VALIDATION, TEST)] == np.bincount(made.fold).tolist()


def test_the_transform_is_fitted_on_training_rows_only(tmp_path):
    films = table()
    fold = fold_of(films.column("id").to_pylist(), 0.1, 0.05)
    held = int(np.flatnonzero(fold == TEST)[0])
    years = films.column("year").to_pylist()
    years[held] = 9999.0
    films = films.set_column(films.column_names.index("year"), "year", pa.array(years))
    data = Prepared.make(films, SCHEMA, TrainConfig(), tmp_path)
    assert data.transform.column("year").high < 2100


@pytest.mark.parametrize("features", ["{year: {kind: numeric}}", "{genres: {kind: multi}}"])
def test_tables_without_numbers_or_without_labels_are_tables_too(tmp_path, features):
    schema = FeatureSchema.from_yaml(f"name: films\nid: id\nfeatures: {features}")
    data = Prepared.make(table(60), schema, TrainConfig(), tmp_path)
    items = torch.arange(10)
    damaged = corrupt(data.table, items, items, CorruptionConfig(), data.layout, torch.Generator())
    assert len(damaged[0]) == len(damaged[3]) == 10


def test_every_kind_of_column_is_prepared_and_damaged(tmp_path):
    rows = 60
    columns = pa.table(
        {
            "id": [str(i) for i in range(rows)],
            "actor": [f"actor {i % 30}" for i in range(rows)],
            "tags": [[f"tag {i % 20}", f"tag {i % 7}"] for i in range(rows)],
            "price": [float(i) for i in range(rows)],
            "views": [[float(i), None, 3.0][: i % 4] for i in range(rows)],
            "poster": [[float(i), float(i % 5)] for i in range(rows)],
        }
    )
    schema = FeatureSchema.from_yaml("""
        name: t
        id: id
        features:
          actor: {kind: nominal, min_count: 3, hash_buckets: 8}
          tags: {kind: multi, max_labels: 0, hash_buckets: 8}
          price: {kind: numeric, bins: 4}
          views: {kind: series, points: 2}
          poster: {kind: vector, size: 2}
        """)
    data = Prepared.make(columns, schema, TrainConfig(), tmp_path)
    items = torch.arange(rows)
    dense, indices, _, lengths = corrupt(
        data.table,
        items,
        items,
        CorruptionConfig(whole=0, swap=0.1, mask=0.4, unseen=0.2),
        data.layout,
        torch.Generator(),
    )
    assert torch.isfinite(dense).all() and lengths.shape == (rows, 2)
    for slot in data.layout.dense:
        masked = dense[:, slot.flag] == 1
        assert 0 < masked.sum() < rows and not dense[masked, slot.start : slot.flag].any()
    for slot in data.layout.bags:  # though most labels have a bucket, what is in none is taught
        assert (indices == slot.base + OOV).any() and (indices == slot.base + MISSING).any()
    assert torch.isfinite(data.marginals.centre).all() and torch.isfinite(data.marginals.spread).all()


def test_a_table_that_does_not_fit_names_its_columns(tmp_path):
    with pytest.raises(SchemaMismatch, match="provider"):
        Prepared.make(table().drop_columns(["provider"]), SCHEMA, TrainConfig(), tmp_path)


def test_a_table_of_a_few_rows_is_refused(tmp_path):
    with pytest.raises(TableError, match="rows to train on"):
        Prepared.make(table(5), SCHEMA, TrainConfig(), tmp_path)
