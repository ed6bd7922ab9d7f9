import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from itemvec.errors import VersionCorrupt
from itemvec.features import FeatureTransform
from itemvec.schema import FeatureSchema
from itemvec.version import Lineage, ModelVersion

TABLE = pa.table({"id": list("abcdef"), "color": list("rgbrgb"), "size": [1.0, 2, 3, 4, 5, 6]})
ITEMS = TABLE.drop_columns(["id"]).to_pylist()
LINEAGE = Lineage(table="t.csv", table_sha256="0" * 64, table_rows=6, train_rows=6, config={"epochs": 1})


def make(seed=0, dim=4, features="{color: {kind: nominal}, size: {kind: numeric}}", version=1):
    schema = FeatureSchema.from_yaml(f"name: t\nid: id\nfeatures: {features}")
    transform = FeatureTransform.fit(TABLE, schema)
    torch.manual_seed(seed)
    config = EncoderConfig(dim=dim)
    network, decoder = ItemEncoder(config, transform.layout), Decoder(config, transform.layout)
    return ModelVersion.make("t", version, transform, network, decoder, {"loss": 0.5}, LINEAGE)


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "1"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "loss.png").write_bytes(b"picture")
    model = make().save(folder, list(zip("abcdef", ITEMS, strict=True)))
    return model, folder


def test_a_loaded_version_is_the_saved_one(saved):
    model, folder = saved
    loaded = ModelVersion.load(folder)
    assert (loaded.ref, loaded.fingerprint, loaded.dim) == ("t@1", model.fingerprint, 4)
    assert loaded.manifest == model.manifest and loaded.evaluation == {"loss": 0.5}
    np.testing.assert_array_equal(loaded.encode(ITEMS).vectors, model.encode(ITEMS).vectors)


def test_nothing_in_a_version_is_a_pickle_and_every_file_is_in_the_manifest(saved):
    model, folder = saved
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {*model.manifest.files, "manifest.json"}
    assert "plots/loss.png" in files
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {
        ".json",
        ".yaml",
        ".safetensors",
        ".parquet",
        ".png",
    }


@pytest.mark.parametrize(
    "name",
    ["schema.yaml", "transform/labels.parquet", "encoder.safetensors", "golden.parquet", "plots/loss.png"],
)
def test_one_changed_byte_refuses_the_version(saved, name):
    _, folder = saved
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(VersionCorrupt, match=rf"t@1 .*{name}"):
        ModelVersion.load(folder)


def test_all_files_may_be_read_by_whom_the_umask_allows(saved, tmp_path):
    (tmp_path / "plain").touch()
    assert {p.stat().st_mode for p in saved[1].rglob("*") if p.is_file()} == {(tmp_path / "plain").stat().st_mode}


def test_a_missing_file_refuses_the_version(saved):
    _, folder = saved
    (folder / "decoder.safetensors").unlink()
    with pytest.raises(VersionCorrupt, match=r"decoder\.safetensors is missing"):
        ModelVersion.load(folder)


def test_a_file_that_goes_while_the_version_is_loaded_refuses_it_by_its_name_in_the_folder(saved, monkeypatch):
    _, folder = saved

    def removed(path):
        (folder / "golden.parquet").unlink()
        return load_file(path)

    monkeypatch.setattr("itemvec.version.load_file", removed)
    with pytest.raises(VersionCorrupt, match=r"golden\.parquet") as refused:
        ModelVersion.load(folder)
    assert str(folder) not in str(refused.value)


def test_a_folder_without_a_manifest_is_no_version(tmp_path):
    with pytest.raises(VersionCorrupt, match=r"no manifest\.json"):
        ModelVersion.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(VersionCorrupt, match="cannot be read"):
        ModelVersion.load(tmp_path)


def test_golden_items_that_give_other_vectors_refuse_the_version(saved, monkeypatch):
    # what a library that computes something else after an upgrade looks like: same files, other vectors
    _, folder = saved
    monkeypatch.setattr("numpy.square", np.abs)
    with pytest.raises(VersionCorrupt, match="golden items"):
        ModelVersion.load(folder)


def test_weights_swapped_together_with_their_digest_are_found_by_the_fingerprint(saved, tmp_path):
    _, folder = saved
    make(seed=1).save(tmp_path / "other", [])
    for name in ("encoder.safetensors", "golden.parquet"):
        shutil.copy(tmp_path / "other" / name, folder / name)
    manifest, other = (json.loads((f / "manifest.json").read_text()) for f in (folder, tmp_path / "other"))
    manifest["files"] = {
        **manifest["files"],
        **{n: other["files"][n] for n in ("encoder.safetensors", "golden.parquet")},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VersionCorrupt, match="fingerprint"):
        ModelVersion.load(folder)


def test_the_fingerprint_follows_what_changes_vectors_and_nothing_else():
    one = make().fingerprint
    assert make().fingerprint == one
    assert make(features="{color: {kind: nominal, weight: 3}, size: {kind: numeric}}").fingerprint == one
    others = {
        make(seed=1).fingerprint,
        make(dim=5).fingerprint,
        make(features="{size: {kind: numeric}}").fingerprint,
    }
    assert len({one, *others}) == 4
