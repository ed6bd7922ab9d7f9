import pyarrow.parquet as pq
import pytest
import s3fs
from click.testing import CliRunner
from films import SCHEMA, table
from s3 import BUCKET, s3
from test_registry import write

from itemvec.cli import cli
from itemvec.errors import RegistryError, TableError
from itemvec.registry import Registry
from itemvec.roots import RemoteRoot
from itemvec.table import batches, files_of, read_table, table_digest
from training.items import Items

__all__ = ["s3"]

URL = f"s3://{BUCKET}"


def put(files: s3fs.S3FileSystem, name: str, rows: int) -> None:
    with files.open(f"{URL}/{name}", "wb") as file:
        pq.write_table(table(rows), file)


def test_tables_and_versions_lie_in_a_bucket(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where versions are fetched to
    put(s3, "films/a.parquet", 30)
    put(s3, "films/b.parquet", 12)
    assert files_of(f"{URL}/films") == [f"{URL}/films/a.parquet", f"{URL}/films/b.parquet"]
    assert read_table(f"{URL}/films").num_rows == sum(map(len, batches(f"{URL}/films", ["id"]))) == 42
    before = table_digest(f"{URL}/films")
    put(s3, "films/b.parquet", 13)
    assert table_digest(f"{URL}/films") != before

    registry = Registry(f"{URL}/registry")
    assert [registry.publish("t", write, "champion"), registry.publish("t", write)] == [1, 2]
    registry.promote("t", 2)
    assert registry.resolve("t") == ("t", 2) and Registry(f"{URL}/registry").load("t").dim == 4
    assert registry.aliases("t") == {"champion": 2, "previous": 1}
    assert registry.root.create("t", "lease", b"one") and not registry.root.create("t", "lease", b"two")
    registry.promote("t", 1)
    registry.set_alias("t", "previous", 1)
    registry.remove("t", 2)
    assert registry.versions("t") == [1]


def test_of_two_promotions_at_one_instant_neither_is_lost_in_a_bucket(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    registry, other = Registry(f"{URL}/registry"), Registry(f"{URL}/registry")
    for alias in ("champion", None, None):
        registry.publish("t", write, alias)
    seen, read = [], registry.root.read

    def overtaken(name: str, file: str) -> bytes | None:
        content = read(name, file)
        if file == "aliases.json" and not seen:
            other.promote("t", 2)
        seen.append(content)
        return content

    monkeypatch.setattr(registry.root, "read", overtaken)
    registry.promote("t", 3)
    assert len(seen) == 2, "the first write was refused"
    assert registry.aliases("t") == {"champion": 3, "previous": 2}
    with pytest.raises(RegistryError, match="t@3 became the champion meanwhile, in place of t@2"):
        registry.promote("t", 1, after=2)


def test_a_bucket_that_is_not_there_is_named_and_not_made(s3, tmp_path):
    with pytest.raises(TableError, match=r"no table at s3://elsewhere/films\.parquet"):
        read_table("s3://elsewhere/films.parquet")
    for use in (lambda registry: registry.resolve("t"), lambda registry: registry.publish("t", write)):
        with pytest.raises(
            RegistryError, match="there is no bucket 'elsewhere' for the registry s3://elsewhere/models"
        ):
            use(Registry("s3://elsewhere/models"))
    put(s3, "films.parquet", 30)
    SCHEMA.save(tmp_path / "films.yaml")
    words = [
        "train",
        f"{URL}/films.parquet",
        "--schema",
        str(tmp_path / "films.yaml"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    done = CliRunner().invoke(cli, [*words, "--registry", "s3://elsewhere/models"])
    assert isinstance(done.exception, RegistryError) and "starting Ray" not in done.output, (
        "not after hours of training"
    )
    assert not s3.exists("elsewhere")


def test_missing_credentials_are_one_line_that_says_for_what(s3, tmp_path, monkeypatch):
    put(s3, "films.parquet", 30)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(TableError, match=f"^cannot read {URL}/films.parquet: Unable to locate credentials$"):
        Items.read(f"{URL}/films.parquet", None, (), tmp_path)
    with pytest.raises(RegistryError, match=f"^cannot use the registry {URL}/models: Unable to locate credentials$"):
        RemoteRoot(f"{URL}/models").names()
