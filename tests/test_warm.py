"""A run that follows a version: it begins where that one ended, and stays where it is."""

import copy
import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
from films import SCHEMA, table

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder, turn
from itemvec.errors import ConfigError
from itemvec.schema import FeatureSchema
from itemvec.version import Lineage, ModelVersion
from training.config import CorruptionConfig, TrainConfig
from training.data import Prepared
from training.loop import Trainer
from training.objectives import chosen
from training.parent import Parent
from training.run import best_of, settle
from training.warm import align, follow, why_anew

NETWORK = EncoderConfig(dim=8, embedding_dim=6, hidden=(16,), decoder_hidden=(16,))
CONFIG = TrainConfig(encoder=NETWORK, epochs=3, batch_size=64)
CPU = torch.device("cpu")
NUMBERS = FeatureSchema.from_yaml(SCHEMA.to_yaml().replace("bins: 16", "bins: 0"))
"""Without bins, whose edges move: what is left of a number is its scale, which can be made up for exactly."""


def trained(films: pa.Table, schema: FeatureSchema, config: TrainConfig, folder, parent: Parent | None = None):
    data = Prepared.make(films, schema, config, folder)
    if parent is not None:
        data = dataclasses.replace(data, parent=parent)
    trainer = Trainer(data, config, CPU)
    list(trainer.epochs())
    encoder, decoder = best_of({"best": trainer.best}, config, data)
    settle(encoder, decoder, data)
    return data, encoder, decoder


def version_of(data: Prepared, encoder: ItemEncoder, decoder: Decoder, config: TrainConfig) -> ModelVersion:
    lineage = Lineage(
        table="films", table_sha256="", table_rows=1, train_rows=1, config=config.model_dump(mode="json")
    )  # fmt: skip
    return ModelVersion.make("films", 1, data.transform, encoder, decoder, {}, lineage)


def made(tmp_path, schema: FeatureSchema, config: TrainConfig = CONFIG) -> ModelVersion:
    return version_of(*trained(table(240), schema, config, tmp_path / "parent"), config)


@pytest.fixture(scope="module")
def version(tmp_path_factory) -> ModelVersion:
    return made(tmp_path_factory.mktemp("version"), NUMBERS)


def begun(parent: ModelVersion, films: pa.Table, schema: FeatureSchema, folder, config: TrainConfig = CONFIG):
    """The first weights of a run on `films` that follows `parent`, as a version."""
    data = Prepared.make(films, schema, config, folder)
    data = dataclasses.replace(data, parent=follow(parent, films, data, config))
    task = Trainer(data, config, CPU).task
    return version_of(data, task.encoder, task.decoder, config)


def drift(one: np.ndarray, other: np.ndarray) -> float:
    """The largest change of an inner product: turning all vectors is none."""
    return float(np.abs(one @ one.T - other @ other.T).max())


@pytest.mark.parametrize(
    "settings",
    [{}, {"hidden": []}, {"skip": False, "normalization": "batch"}, {"nested": [4]}],
    ids=str,
)
def test_training_begins_with_the_vectors_of_the_version_though_labels_and_scales_were_fitted_anew(tmp_path, settings):
    config = TrainConfig.model_validate({**CONFIG.model_dump(), "encoder": {**NETWORK.model_dump(), **settings}})
    parent = made(tmp_path, NUMBERS, config)
    later = table(400, seed=1)  # other films: other counts and so another order of labels, other means and deviations
    child = begun(parent, later, NUMBERS, tmp_path / "child", config)
    old, new = (version.transform.column("cast").vocabulary for version in (parent, child))
    assert set(old.labels) == set(new.labels) and old.labels != new.labels
    assert child.transform.column("year").mean != parent.transform.column("year").mean
    some = later.slice(0, 60)
    before, after = parent.encode_arrow(some).vectors, child.encode_arrow(some).vectors
    assert drift(before, after) < 1e-3


def test_cross_layers_are_carried_over(tmp_path):
    config = CONFIG.model_copy(update={"encoder": NETWORK.model_copy(update={"cross": 2, "cross_rank": 4})})
    parent = made(tmp_path, NUMBERS, config)
    child = begun(parent, table(240), NUMBERS, tmp_path / "child", config)
    assert parent.encoder.cross[0].wide.weight.abs().sum() > 0
    assert drift(parent.encode_arrow(table(240)).vectors, child.encode_arrow(table(240)).vectors) < 1e-4


def test_what_the_decoder_reads_back_is_carried_over_in_the_new_units(version, tmp_path):
    later = table(400, seed=1).slice(0, 290)
    child = begun(version, later, version.schema, tmp_path / "child")
    with torch.inference_mode():
        values = {}
        for name, model in (("old", version), ("new", child)):
            vectors = torch.from_numpy(model.encode_arrow(later).vectors)
            column = next(slot for slot in model.transform.layout.dense if slot.name == "year")
            read = model.decoder.dense(model.decoder(vectors))[:, column.start].numpy()
            values[name] = read * model.transform.column("year").std + model.transform.column("year").mean
            genres = next(slot for slot in model.transform.layout.bags if slot.name == "genres")
            rows = [model.transform.column("genres").vocabulary.row(g) for g in ("Drama", "Crime", "Action")]
            hidden = model.decoder(vectors)
            values[name + " genres"] = model.decoder.rows(hidden, torch.tensor(rows) + genres.base).numpy()
    np.testing.assert_allclose(values["old"], values["new"], atol=0.02)  # years
    np.testing.assert_allclose(values["old genres"], values["new genres"], atol=1e-3)


def test_a_new_label_begins_as_the_unseen_one_and_a_label_that_is_gone_goes(version, tmp_path):
    films = table(240)
    provider = ["Mubi" if name == "Netflix" else name for name in films.column("provider").to_pylist()]
    films = films.set_column(films.column_names.index("provider"), "provider", [provider])
    child = begun(version, films, version.schema, tmp_path / "child")
    labels = child.transform.column("provider").vocabulary.labels
    assert "Mubi" in labels and "Netflix" not in labels
    item = {"title": "star moon", "genres": ["Drama"], "year": 1995.0}
    of = {name: child.encode([{**item, "provider": name}]).vectors[0] for name in ("Mubi", "never seen", "Hulu")}
    np.testing.assert_allclose(of["Mubi"], of["never seen"], atol=1e-6)
    before = version.encode([{**item, "provider": "Hulu"}, {**item, "provider": "never seen"}]).vectors
    assert drift(np.stack([of["Hulu"], of["Mubi"]]), before) < 1e-3


def test_hashed_labels_keep_their_buckets(tmp_path):
    text = (
        "name: films\nid: id\nfeatures: {cast: {kind: multi, max_labels: 12, hash_buckets: 16}, genres: {kind: multi}}"
    )
    schema = FeatureSchema.from_yaml(text)
    parent = made(tmp_path, schema)
    child = begun(parent, table(400, seed=1), schema, tmp_path / "child")
    old, new = (set(version.transform.column("cast").vocabulary.labels) for version in (parent, child))
    assert new - old and old - new  # of which the former had a bucket's row, and the latter lose their own
    items = [{"cast": [label], "genres": ["Drama"]} for label in [*new, "never seen"]]
    assert drift(parent.encode(items).vectors, child.encode(items).vectors) < 1e-3


def test_a_column_that_is_gone_counts_as_missing_and_a_new_one_counts_nothing_yet(version, tmp_path):
    features = version.schema.features
    without = version.schema.model_copy(
        update={"features": tuple(f for f in features if f.name not in ("title", "year"))}
    )
    child = begun(version, table(240), without, tmp_path / "without")
    films = table(240).slice(0, 60)
    missing = films.drop_columns(["title", "year"])
    assert drift(version.encode_arrow(missing).vectors, child.encode_arrow(films).vectors) < 1e-3
    parent = made(tmp_path, without)
    grown = begun(parent, table(240), version.schema, tmp_path / "grown")
    assert drift(parent.encode_arrow(films).vectors, grown.encode_arrow(films).vectors) < 1e-3


def test_bins_that_moved_are_matched_by_what_they_mean(tmp_path):
    parent = made(tmp_path, SCHEMA)
    later = table(400, seed=3)
    child = begun(parent, later, SCHEMA, tmp_path / "child")
    assert parent.transform.column("year").width != 2
    before, after = (v.encode_arrow(later).vectors for v in (parent, child))
    cosine = (before @ before.T * (after @ after.T)).mean()
    assert np.abs(before @ before.T - after @ after.T).mean() < 0.01 and cosine > 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"warm": False}, "warm is off"),
        ({"encoder": {**NETWORK.model_dump(), "hidden": [32]}}, "encoder.hidden was [16] and is [32]"),
        ({"test": 0.2}, "the share test was 0.1 and is 0.2"),
        ({"encoder": {**NETWORK.model_dump(), "dropout": 0.5}, "epochs": 9}, ""),
    ],
)
def test_a_network_of_another_shape_begins_anew_and_says_why(version, change, why):
    assert why_anew(version.manifest, TrainConfig.model_validate({**CONFIG.model_dump(), **change})) == why


def test_vectors_are_turned_onto_those_of_the_version_and_no_angle_changes(version, tmp_path):
    data = Prepared.make(table(240), version.schema, CONFIG, tmp_path)
    data = dataclasses.replace(data, parent=follow(version, table(240), data, CONFIG))
    encoder, decoder = copy.deepcopy(version.encoder), copy.deepcopy(version.decoder)
    dice = torch.Generator().manual_seed(0)
    turn(encoder, decoder, torch.linalg.qr(torch.randn(8, 8, generator=dice, dtype=torch.float64))[0])
    batch = data.transform.transform_table(table(240))
    turned = encoder.encode(batch)
    before = version.encode_arrow(table(240)).vectors
    assert np.abs(turned - before).max() > 0.3
    align(encoder, decoder, data)
    np.testing.assert_allclose(encoder.encode(batch), before, atol=1e-4)
    assert drift(turned, encoder.encode(batch)) < 1e-4
    torch.testing.assert_close(decoder.basis, version.decoder.basis, atol=1e-4, rtol=0)


def test_trained_prefixes_are_turned_within_themselves(tmp_path):
    config = CONFIG.model_copy(update={"encoder": NETWORK.model_copy(update={"nested": (2, 4)})})
    data, encoder, decoder = trained(table(240), SCHEMA, config, tmp_path / "one")
    parent = version_of(data, encoder, decoder, config)
    other = config.model_copy(update={"seed": 5})
    data, encoder, decoder = trained(table(240), SCHEMA, other, tmp_path / "two")
    data = dataclasses.replace(data, parent=follow(parent, table(240), data, other))
    batch = data.transform.transform_table(table(240))
    before = encoder.encode(batch)
    align(encoder, decoder, data)
    after = encoder.encode(batch)
    for size in (2, 4, 8):
        assert drift(before[:, :size], after[:, :size]) < 1e-4
    assert ((after * parent.encode_arrow(table(240)).vectors).sum(1).mean()) > (
        (before * parent.encode_arrow(table(240)).vectors).sum(1).mean()
    )


def test_compatible_holds_vectors_where_the_version_has_them(version, tmp_path):
    still = CorruptionConfig(swap=0, mask=0, thin=0, unseen=0)
    later, moved = table(400, seed=1), {}
    for weight in (0.0, 10.0):
        config = CONFIG.model_copy(update={"compatible": weight, "seed": 3, "corruption": still, "epochs": 6})
        data = Prepared.make(later, version.schema, config, tmp_path / str(weight))
        parent = follow(version, later, data, config)
        data, encoder, decoder = trained(later, version.schema, config, tmp_path / str(weight), parent)
        data = dataclasses.replace(data, parent=parent)
        align(encoder, decoder, data)
        ours = encoder.encode(data.transform.transform_table(later))
        moved[weight] = float((ours * version.encode_arrow(later).vectors).sum(1).mean())
    assert moved[10.0] > 0.98 > moved[0.0] > 0.5


def test_compatible_with_vectors_of_another_dim_is_refused(version, tmp_path):
    config = CONFIG.model_copy(
        update={"compatible": 1.0, "encoder": NETWORK.model_copy(update={"dim": 4})}
    )  # fmt: skip
    data = Prepared.make(table(240), version.schema, config, tmp_path)
    data = dataclasses.replace(data, parent=follow(version, table(240), data, config))
    with pytest.raises(ConfigError, match=r"near those of version 1, which have another encoder\.dim than 4"):
        chosen(config, data)


def test_only_training_rows_that_vectors_are_turned_by_are_encoded_unless_all_are_to_stay(
    version, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.warm.ALIGNED", 50)
    monkeypatch.setattr("training.warm.BLOCK", 100)  # 240 rows: two blocks and a rest
    films = table(240)
    data, every = Prepared.make(films, version.schema, CONFIG, tmp_path), version.encode_arrow(films).vectors
    some, all_rows = (
        follow(version, films, data, CONFIG.model_copy(update={"compatible": c}), tmp_path) for c in (0, 1)
    )
    assert 20 < len(some.rows) <= 50 and all(data.fold[some.rows] == 0)
    assert all_rows.rows.tolist() == list(range(240))
    for parent in (some, all_rows):
        np.testing.assert_allclose(parent.vectors.numpy(), every[parent.rows], atol=1e-6)
        encoder, decoder = copy.deepcopy(version.encoder), copy.deepcopy(version.decoder)
        align(encoder, decoder, dataclasses.replace(data, parent=parent))
        np.testing.assert_allclose(encoder.encode(data.transform.transform_table(films)), every, atol=1e-4)


def test_workers_open_what_the_driver_took_from_the_version(version, tmp_path):
    config = CONFIG.model_copy(update={"compatible": 1.0})
    made_by_driver = Prepared.make(table(240), version.schema, config, tmp_path)
    made_by_driver = made_by_driver.with_parent(follow(version, table(240), made_by_driver, config), tmp_path)
    one, other = Trainer(made_by_driver, config, CPU), Trainer(Prepared.open(tmp_path), config, CPU)
    for mine, theirs in zip(one.task.parameters(), other.task.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    items = torch.tensor([3, 5])
    assert torch.equal(one.data.parent.as_trained(items), other.data.parent.as_trained(items))


def test_a_run_that_is_taken_up_again_does_not_begin_with_the_version_again(version, tmp_path):
    data = Prepared.make(table(240), version.schema, CONFIG, tmp_path)
    data = dataclasses.replace(data, parent=follow(version, table(240), data, CONFIG))
    first = Trainer(data, CONFIG, CPU)
    next(first.epochs())
    second = Trainer(data, CONFIG, CPU)
    second.restore(first.state())
    for mine, theirs in zip(first.task.parameters(), second.task.parameters(), strict=True):
        assert torch.equal(mine, theirs)
