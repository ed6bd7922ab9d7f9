import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_version import ITEMS, make

from itemvec.errors import ConfigError, ModelNotFound, RegistryError, VersionCorrupt, VersionNotFound
from itemvec.registry import Registry


def write(folder, version):
    make(seed=version, version=version).save(folder, [("a", ITEMS[0])])


@pytest.fixture(params=["folder", "memory"])
def registry(request, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of remote registries
    registry = Registry(tmp_path / "registry" if request.param == "folder" else f"memory://{tmp_path.name}")
    for _ in range(3):
        registry.publish("t", write)
    return registry


def test_versions_are_numbered_from_1_and_loaded_by_reference(registry):
    registry.promote("t", 2)
    assert registry.names() == ["t"] and registry.versions("t") == [1, 2, 3]
    assert registry.resolve("t") == registry.resolve("t@champion") == registry.resolve("t@2") == ("t", 2)
    assert registry.load("t@3").encode(ITEMS).vectors.shape == (6, 4)


def test_promotion_keeps_the_previous_champion_for_a_rollback(registry):
    registry.promote("t", 1)
    registry.set_alias("t", "challenger", 3)
    registry.promote("t", 3)
    assert registry.aliases("t") == {"champion": 3, "previous": 1}
    assert registry.rollback("t") == 1
    assert registry.aliases("t") == {"champion": 1, "previous": 3}
    registry.promote("t", 1)  # again: nothing to change, `previous` stays
    assert registry.aliases("t") == {"champion": 1, "previous": 3}


def test_a_rollback_without_a_previous_champion_is_refused(registry):
    registry.promote("t", 1)
    with pytest.raises(RegistryError, match="no previous champion"):
        registry.rollback("t")


def test_what_is_not_there_is_answered_with_what_is(registry, tmp_path):
    with pytest.raises(ModelNotFound, match="'nobody'; there is t"):
        registry.resolve("nobody@7")
    with pytest.raises(VersionNotFound, match=r"no version '9'; there is 1, 2, 3"):
        registry.resolve("t@9")
    with pytest.raises(VersionNotFound, match="'champion'"):
        registry.resolve("t")
    with pytest.raises(ModelNotFound):
        registry.resolve("../../etc")
    for ref in ("t@Champion", "t@", "t@-1", "t@../2", "t@" + "9" * 5000):
        with pytest.raises(VersionNotFound, match="there is 1, 2, 3"):
            registry.resolve(ref)
    with pytest.raises(VersionNotFound):
        registry.promote("t", 9)
    with pytest.raises(RegistryError, match="no alias 'best'"):
        registry.set_alias("t", "best", 1)
    with pytest.raises(ModelNotFound, match="itemvec train"):
        Registry(tmp_path / "empty").resolve("t")


def test_a_remote_version_is_fetched_once_and_again_if_the_copy_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    registry = Registry(f"memory://{tmp_path.name}")
    registry.publish("t", write)
    copy = registry.path("t", 1) / "encoder.safetensors"
    before = copy.stat().st_mtime_ns
    assert registry.path("t", 1).joinpath("encoder.safetensors").stat().st_mtime_ns == before
    copy.write_bytes(b"damaged")
    assert registry.load("t@1").ref == "t@1"


@pytest.mark.parametrize("registry", ["folder"], indirect=True)
@pytest.mark.parametrize(("copy", "ref"), [("t/versions/6", "t@6"), ("films/versions/3", "films@3")])
def test_a_folder_that_was_copied_is_no_version_of_its_new_name(registry, copy, ref):
    root = Path(registry.url)
    shutil.copytree(root / "t" / "versions" / "3", root / copy)
    name, _, version = ref.partition("@")
    for read in (lambda: registry.load(ref), lambda: registry.manifest(name, int(version))):
        with pytest.raises(VersionCorrupt, match=rf"{ref} .* says t@3"):
            read()
    assert registry.load("t@3").ref == "t@3"


def test_what_calls_itself_otherwise_is_not_published(registry):
    with pytest.raises(VersionCorrupt, match=r"t@4 .* says t@1"):
        registry.publish("t", lambda folder, version: write(folder, 1))
    assert registry.versions("t") == [1, 2, 3]


def test_a_version_that_is_removed_while_it_is_fetched_is_corrupt(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    registry = Registry(f"memory://{tmp_path.name}")
    registry.publish("t", write)
    resolve = registry.resolve

    def removed(ref):
        found = resolve(ref)
        registry.root.fs.rm_file(str(registry.root.root / "t/versions/1/golden.parquet"))
        return found

    monkeypatch.setattr(registry, "resolve", removed)
    with pytest.raises(VersionCorrupt, match=r"t@1 .* gone"):
        registry.load("t@1")


def test_a_registry_whose_protocol_is_unknown_is_a_config_error():
    with pytest.raises(ConfigError, match="nowhere"):
        Registry("nowhere://models")


def test_a_failed_publication_leaves_nothing_and_its_number_is_not_used_again(registry):
    def fail(folder, version):
        (folder / "half").write_text("written")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        registry.publish("t", fail)
    with pytest.raises(VersionCorrupt):
        registry.publish("t", lambda folder, version: None)  # wrote no manifest
    assert registry.versions("t") == [1, 2, 3]
    assert not list(Path(registry.url).glob("t/versions/*/half"))
    assert registry.publish("t", write) == 6


def test_many_publishers_at_once_each_get_a_number_of_their_own(registry):
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: registry.publish("t", write), range(8)))
    assert sorted(versions) == list(range(4, 12)) and registry.versions("t") == list(range(1, 12))


@pytest.mark.parametrize("registry", ["folder"], indirect=True)
def test_a_killed_publisher_leaves_no_version(registry):
    code = f"""
import os, signal
from itemvec.registry import Registry
def write(folder, version):
    (folder / "encoder.safetensors").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
Registry({str(registry.url)!r}).publish("t", write)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    assert done.returncode == -9
    assert registry.versions("t") == [1, 2, 3] and registry.publish("t", write) == 5


@pytest.mark.parametrize("registry", ["folder"], indirect=True)
def test_aliases_survive_many_writers_at_once(registry):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: registry.promote("t", 1 + i % 3), range(60)))
    aliases = registry.aliases("t")
    assert set(aliases) == {"champion", "previous"} and aliases["champion"] != aliases["previous"]


@pytest.mark.parametrize("registry", ["folder"], indirect=True)
def test_a_broken_aliases_file_is_named(registry):
    (Path(registry.url) / "t" / "aliases.json").write_text("{")
    with pytest.raises(RegistryError, match=r"aliases\.json"):
        registry.resolve("t")
    (Path(registry.url) / "t" / "aliases.json").write_text("[]")
    with pytest.raises(RegistryError, match="not alias names with versions"):
        registry.resolve("t")
    (Path(registry.url) / "t" / "aliases.json").write_text(json.dumps({"champion": 1}))
    assert registry.resolve("t") == ("t", 1)
