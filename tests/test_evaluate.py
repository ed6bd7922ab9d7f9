import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch
from click.testing import CliRunner
from films import SCHEMA, table

from itemvec.cli import cli
from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from itemvec.errors import SchemaMismatch, TableError
from itemvec.registry import Registry
from itemvec.schema import FeatureSchema
from itemvec.version import Lineage, ModelVersion
from training.baselines import BASELINES
from training.cli import likes_as
from training.config import TrainConfig
from training.data import Prepared
from training.evaluate import against, assess, evaluate_version, like_with_like
from training.folds import TEST, TRAIN
from training.judged import Views, judged, measured_rows, one_hot, searched_rows
from training.loop import Trainer
from training.run import settle

CONFIG = TrainConfig(
    encoder=EncoderConfig(dim=16, embedding_dim=8, hidden=(32,), decoder_hidden=(32,), dropout=0),
    epochs=25,
    batch_size=64,
    test=0.3,
)
DOCS = Path(__file__).parents[1] / "docs" / "evaluation.md"


def likes_of_style(films, users=40):
    """(users, films): each likes every film of one style whose first actor is known, a third of the users each."""
    style = [int(cast[0].split()[1][0]) if cast else -1 for cast in films.column("cast").to_pylist()]
    return sp.csr_matrix(np.array([[float(s == user % 3) for s in style] for user in range(users)], np.float32))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    data = Prepared.make(table(600), SCHEMA, CONFIG, tmp_path_factory.mktemp("prepared"))
    trainer = Trainer(data, CONFIG, torch.device("cpu"))
    list(trainer.epochs())
    encoder, decoder = trainer.task.encoder, trainer.task.decoder
    settle(encoder, decoder, data)
    lineage = Lineage(
        table="films", table_sha256="0" * 64, table_rows=600, train_rows=300, config=CONFIG.model_dump(mode="json")
    )
    version = ModelVersion.make("films", 1, data.transform, encoder, decoder, {}, lineage)
    return data, judged(data, encoder, decoder), version


@pytest.fixture(scope="module")
def evaluated(trained):
    data, model, version = trained
    return assess(model, table(600), SCHEMA, data.fold, likes_of_style(table(600)), version)[0]


def test_the_decoder_beats_the_majority_on_rows_that_it_never_saw(evaluated):
    columns = evaluated["columns"]
    for name in ("provider", "genres", "year"):
        assert columns[name]["score"] > columns[name]["majority"] + 0.1, name
    for name in ("provider", "genres", "cast", "rating", "year"):
        assert columns[name]["loss"] < 0.9, name
    assert columns["rating"]["score"] < columns["rating"]["majority"]  # an error: lower is better
    assert columns["cast"]["r_precision"]["score"] > columns["cast"]["r_precision"]["majority"] + 0.1


def test_a_hidden_column_is_inferred_from_the_others_and_noise_is_not(evaluated):
    # The provider follows from the decade, which year and release date know; nothing tells which actors of the style.
    assert evaluated["columns"]["provider"]["inferred"] > 0.9
    assert evaluated["columns"]["provider"]["majority"] < 0.7
    assert evaluated["columns"]["cast"]["inferred"] < 0.3


def test_neighbors_share_what_was_hidden(evaluated):
    genres = evaluated["retrieval"]["columns"]["genres"]
    assert genres["precision"] > 2 * genres["base_rate"]
    assert set(genres) == {"precision", "base_rate", "one_hot", "hashing", "svd", "pca", "pca_unit_variance"}
    assert evaluated["retrieval"]["mean"]["precision"] == pytest.approx(
        np.mean([c["precision"] for c in evaluated["retrieval"]["columns"].values()])
    )


def test_the_longest_prefix_is_the_whole_vector(evaluated):
    prefixes, mean = evaluated["retrieval"]["prefixes"], evaluated["retrieval"]["mean"]
    assert list(prefixes) == ["8", "16"]
    loss = np.mean([column["loss"] for column in evaluated["columns"].values()])
    assert prefixes["16"] == pytest.approx({"precision": mean["precision"], "pca": mean["pca"], "loss": loss}, abs=1e-3)
    assert prefixes["8"]["loss"] > loss  # half of the numbers say less


def test_cold_films_of_a_liked_style_are_found(evaluated, trained):
    cold = evaluated["cold_start"]
    assert cold["users"] == 40
    assert cold["cold_items"] < (trained[0].fold == TEST).sum() < 600 * 0.4
    # About 55 cold films of each style, of which 20 are recommended: all of them liked would be a recall of .36.
    assert cold["model"]["ndcg"] > 0.9 and cold["model"]["pm_auc"] > 0.9
    assert cold["chance"]["ndcg"] < 0.5 and cold["chance"]["pm_auc"] == pytest.approx(0.5, abs=0.05)


def test_the_space_is_centred_and_in_use(evaluated, trained):
    assert abs(evaluated["space"]["mean_cosine"]) < 0.1
    assert 2 < evaluated["space"]["effective_rank"] <= 16
    assert trained[1].encoder.mean.abs().sum() > 0


def test_a_version_agrees_with_itself_on_all_neighbors(evaluated):
    whole = pytest.approx(1.0, abs=1e-3)
    assert evaluated["parent"] == {
        "version": 1, "k": 10, "overlap": whole, "compatibility": whole, "cross_recall": whole,
    }  # fmt: skip


def test_a_table_that_the_parent_cannot_read_has_no_overlap_with_it(trained):
    data, model, version = trained
    other = table(600).set_column(5, "rating", [[4.5] * 600])
    assert against(version, model, other, data.fold) is None
    assert against(version, model, table(600).drop_columns(["id"]), data.fold) is None


def test_samples_name_items_of_the_table_nearest_first(evaluated):
    ids = set(table(600).column("id").to_pylist())
    for sample in evaluated["samples"]:
        scores = [neighbor["score"] for neighbor in sample["neighbors"]]
        assert {sample["id"], *(n["id"] for n in sample["neighbors"])} <= ids and scores == sorted(scores, reverse=True)
        assert sample["id"] not in {n["id"] for n in sample["neighbors"]}


def test_the_measured_rows_are_held_out_and_come_first_in_the_search(evaluated, trained):
    fold = trained[0].fold
    measured, searched = measured_rows(fold), searched_rows(fold)
    assert set(fold[measured]) == {TEST} and len(measured) == evaluated["rows"]["measured"]
    assert (searched[: len(measured)] == measured).all() and set(fold[searched[len(measured) :]]) == {TRAIN}


def test_a_view_without_a_column_is_that_of_an_item_that_lacks_it(trained):
    _, model, version = trained
    film = {k: v for k, v in table(600).slice(7, 1).to_pylist()[0].items() if v is not None}
    film = {**film, "released": film["released"].isoformat()} if "released" in film else film
    without = {k: v for k, v in film.items() if k not in {"genres", "id"}}
    with torch.inference_mode():
        hidden = Views(model, np.array([7])).without("genres").numpy()
    np.testing.assert_allclose(hidden, version.encode([without]).vectors, atol=1e-5)


def test_one_hot_has_a_1_per_label(trained):
    data, model, _ = trained
    slot = next(s for s in data.layout.bags if s.name == "genres")
    hot = one_hot(model, slot)
    vocabulary = data.transform.column("genres").vocabulary
    genres = table(600).column("genres").to_pylist()
    for item in (0, 7, 599):
        assert sorted(hot[item].indices) == sorted({vocabulary.row(g) for g in genres[item] or []} or {1})
    assert (one_hot(model, slot, np.array([7, 3])).toarray() == hot[[7, 3]].toarray()).all()


def test_items_are_compared_with_others_by_the_columns_that_both_have():
    # Two easy columns and a hard one. Item 0 lacks the hard one: it is compared by the easy ones, 0.5 against 0.9, and
    # not against the others' mean over all three.
    nan = np.nan
    by_column = np.array([[0.4, 0.8, 1.0], [0.6, 0.9, 0.9], [nan, 0.0, 0.1]], np.float32)
    here, others = like_with_like(by_column, np.array([True, False, False]))
    assert here == pytest.approx(0.5) and others == pytest.approx(0.9)
    assert like_with_like(by_column, np.zeros(3, bool)) == (None, None)


def test_a_table_of_numbers_alone_has_no_hidden_labels_to_share(tmp_path):
    schema = FeatureSchema.from_yaml("name: t\nid: id\nfeatures: {a: {kind: numeric}, b: {kind: numeric}}")
    rng = np.random.default_rng(0)
    numbers = pa.table({"id": [str(n) for n in range(40)], "a": rng.random(40), "b": rng.random(40)})
    data = Prepared.make(numbers, schema, CONFIG, tmp_path)
    encoder, decoder = (part(CONFIG.encoder, data.layout) for part in (ItemEncoder, Decoder))
    result, shown = assess(judged(data, encoder, decoder), numbers, schema, data.fold)
    assert result["retrieval"] == {"k": 10, "columns": {}, "mean": {}}
    assert result["out_of_vocabulary"]["precision"] is None
    assert [coloring.column for coloring in shown.colorings] == ["a", "b"]
    assert result["columns"]["a"]["pca"] == pytest.approx(1.0, abs=0.01)  # two components of two numbers and no flag


NAMED = {
    "columns": "NAME",
    "retrieval.columns": "NAME",
    "out_of_vocabulary.columns": "NAME",
    "retrieval.prefixes": "SIZE",
}
WITH_BASELINES = {"retrieval.columns.NAME", "retrieval.mean", "cold_start"}
WRITTEN_BY_A_RUN = {"profile", "predict", "training", "seconds", "gate"}


def keys(value, path=""):
    """Every key, with dots for groups; columns, sizes and baselines in capitals, as the document writes them."""
    if isinstance(value, list):
        value = value[0]
    if not isinstance(value, dict):
        return {path}
    found = set()
    for key, inner in value.items():
        name = "BASELINE" if key in BASELINES and path in WITH_BASELINES else NAMED.get(path, key)
        found |= keys(inner, f"{path}.{name}" if path else name)
    return found


def documented():
    text = DOCS.read_text(encoding="utf-8").split("## Every key")[1]
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))


def test_the_document_names_every_key_that_is_written_and_no_other(evaluated):
    assert {key for key in documented() if key.split(".")[0] not in WRITTEN_BY_A_RUN} == keys(evaluated)


def test_the_command_measures_a_version_on_the_rows_that_training_held_out(evaluated, trained, tmp_path):
    version = trained[2]
    Registry(tmp_path / "registry").publish("films", lambda folder, _: version.save(folder, []), alias="champion")
    pq.write_table(table(600), tmp_path / "films.parquet")
    where = ["--registry", str(tmp_path / "registry"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, ["evaluate", "films", str(tmp_path / "films.parquet"), *where])
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert said["rows"] == evaluated["rows"] and said["parent"] is None and said["cold_start"] is None
    for name, column in said["columns"].items():
        assert column["score"] == pytest.approx(evaluated["columns"][name]["score"], abs=1e-4), name
    assert "<title>films@1: evaluation</title>" in (tmp_path / "out" / "report.html").read_text()
    assert str(tmp_path / "out" / "report.html") in done.output.replace("\n", "")


def test_likes_of_any_source_are_judged_on_the_rows_of_the_table(evaluated, trained, tmp_path):
    pq.write_table(table(600), tmp_path / "films.parquet")
    registry, asked = Registry(tmp_path / "registry"), []

    def likes_of(ids, fold):
        asked.append((ids, fold.tolist()))
        return likes_of_style(table(600))

    result, _ = evaluate_version(trained[2], str(tmp_path / "films.parquet"), registry, likes_of)
    assert asked == [(table(600).column("id").to_pylist(), trained[0].fold.tolist())]
    assert result["cold_start"]["model"] == pytest.approx(evaluated["cold_start"]["model"], abs=1e-3)


def test_the_command_reads_likes_by_the_columns_that_it_is_told(evaluated, trained, tmp_path):
    version, films = trained[2], table(600)
    Registry(tmp_path / "registry").publish("films", lambda folder, _: version.save(folder, []), alias="champion")
    pq.write_table(films, tmp_path / "films.parquet")
    user, film = likes_of_style(films).nonzero()
    ids = films.column("id").to_pylist()
    likes = pa.table({"who": [f"user {u}" for u in user], "film": [ids[f] for f in film], "stars": [9] * len(user)})
    pq.write_table(likes, tmp_path / "likes.parquet")
    where = ["--registry", str(tmp_path / "registry"), "--out", str(tmp_path / "out")]
    read = ["--interactions", str(tmp_path / "likes.parquet"), "--set", "interactions.user=who"]
    columns = ["--set", "interactions.item=film"]
    done = CliRunner().invoke(cli, ["evaluate", "films", str(tmp_path / "films.parquet"), *where, *read, *columns])
    assert done.exit_code == 0, done.output
    cold = json.loads((tmp_path / "out" / "evaluation.json").read_text())["cold_start"]
    assert cold["users"] == evaluated["cold_start"]["users"]
    assert cold["model"] == pytest.approx(evaluated["cold_start"]["model"], abs=1e-3)


def test_without_a_table_of_likes_those_of_the_training_are_read_as_it_read_them(tmp_path):
    place, said = tmp_path / "likes.parquet", []
    pq.write_table(pa.table({"who": ["ann", "ann", "bob"], "item_id": ["x", "y", "gone"]}), place)
    lineage = Lineage(
        table="films", table_sha256="0" * 64, table_rows=2, train_rows=2, interactions=str(place),
        config={"interactions": {"user": "who"}},
    )  # fmt: skip
    ids, fold = ["x", "y"], np.zeros(2, np.int8)
    likes = likes_as(None, (), lineage, said.append)(ids, fold)
    assert likes.toarray().tolist() == [[1, 1], [0, 0]] and said == [f"with the likes of its training, {place}"]
    place.unlink()
    assert likes_as(None, (), lineage, said.append)(ids, fold) is None
    assert said[1].startswith("the likes of its training cannot be read") and str(place) in said[1]
    with pytest.raises(TableError):  # what was asked for is not left out
        likes_as(str(place), (), lineage, said.append)(ids, fold)
    assert likes_as(None, (), lineage.model_copy(update={"interactions": None}), said.append) is None


def test_the_command_names_a_column_that_the_table_lacks(trained, tmp_path):
    version = trained[2]
    Registry(tmp_path / "registry").publish("films", lambda folder, _: version.save(folder, []), alias="champion")
    pq.write_table(table(600).drop_columns(["genres"]), tmp_path / "films.parquet")
    done = CliRunner().invoke(
        cli, ["evaluate", "films", str(tmp_path / "films.parquet"), "--registry", str(tmp_path / "registry")]
    )
    assert isinstance(done.exception, SchemaMismatch) and "genres" in str(done.exception)
