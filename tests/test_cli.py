import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_version import ITEMS, TABLE, make

import itemvec.cli
from itemvec.errors import ConfigError
from itemvec.registry import Registry


@pytest.fixture
def registry(tmp_path):
    registry = Registry(tmp_path / "registry")
    for seed in (1, 2):
        registry.publish(
            "t", lambda folder, version, seed=seed: make(seed, version=version).save(folder, [("a", ITEMS[0])])
        )
    registry.promote("t", 1)
    return registry


def run(*words, text=None):
    return CliRunner().invoke(itemvec.cli.cli, [str(w) for w in words], input=text)


def embed(registry, *words, text=None):
    done = run("embed", *words, "--registry", registry.url, text=text)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_help_names_every_command():
    assert set(itemvec.cli.ORDER) == {*itemvec.cli.cli.commands, *itemvec.cli.cli.found}
    assert "embed-table" in run("--help").output


def test_a_schema_is_inferred_written_and_found_good(tmp_path):
    table, schema = tmp_path / "My Items.csv", tmp_path / "s.yaml"
    table.write_text("id,color\n" + "".join(f"{i},{'red' if i % 2 else 'blue'}\n" for i in range(20)))
    assert "name: my-items" in run("schema", "infer", table).stdout
    assert run("schema", "infer", table, "--out", schema).exit_code == 0
    assert "--force" in run("schema", "infer", table, "--out", schema).output  # never overwrites by itself
    done = run("schema", "check", table, schema)
    assert done.exit_code == 0 and "2 labels" in done.stdout


def test_schema_check_fails_for_a_table_that_training_would_refuse(tmp_path):
    (tmp_path / "t.csv").write_text("id,colour\n1,red\n")
    (tmp_path / "s.yaml").write_text("name: t\nid: id\nfeatures: {color: {kind: nominal}}")
    done = run("schema", "check", tmp_path / "t.csv", tmp_path / "s.yaml")
    assert done.exit_code == 1 and "did you mean 'colour'?" in done.output and "1 error" in done.output


def test_models_are_listed_shown_promoted_and_rolled_back(registry):
    where = ("--registry", registry.url)
    assert "t@2" in run("models", "list", *where).stdout
    assert json.loads(run("models", "show", "t", *where).stdout)["version"] == 1
    assert "t@2 is the champion" in run("models", "promote", "t@2", *where).stdout
    assert registry.aliases("t") == {"champion": 2, "previous": 1}
    assert "t@1 is the champion again" in run("models", "rollback", "t", *where).stdout
    assert registry.aliases("t")["champion"] == 1


def test_a_broken_version_is_not_promoted(registry):
    (registry.path("t", 2) / "encoder.safetensors").write_bytes(b"broken")
    assert run("models", "promote", "t@2", "--registry", registry.url).exit_code == 1
    assert registry.aliases("t")["champion"] == 1


def test_embed_prints_the_vector_that_the_model_gives(registry):
    [line] = embed(registry, json.dumps({"color": "r", "size": 99, "new": 1}))
    assert line["embedding"] == pytest.approx(make(1).encode([{"color": "r", "size": 6}]).vectors[0].tolist(), abs=1e-6)
    assert line["columns"] == {"size": "clipped", "new": "ignored"}


def test_embed_reads_lines_and_tables_too(registry, tmp_path):
    from pyarrow import parquet

    parquet.write_table(TABLE, tmp_path / "t.parquet")
    by_table = embed(registry, "--table", tmp_path / "t.parquet", "--model", "t@2")
    by_line = embed(registry, "-", "--model", "t@2", text="\n".join(json.dumps(item) for item in ITEMS))
    assert [line.pop("id") for line in by_table] == TABLE.column("id").to_pylist()
    assert by_table == by_line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embed", "{"], "is not JSON"),
        (["embed", "[1]"], "not a JSON object"),
        (["embed"], "either items or --table"),
        (["similar", "x", "--url", "http://127.0.0.1:1"], "itemvec serve"),
        (["load", "none.csv", "--url", "http://127.0.0.1:1"], "itemvec serve"),
        (["models", "show", "nobody"], "no model 'nobody'"),
        (["schema", "infer", "none.csv"], "no table at none.csv"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(registry, words, said):
    where = ["--registry", registry.url] if words[0] in {"embed", "models"} else []
    done = run(*words, *where)
    assert done.exit_code != 0
    assert said in (
        str(done.exception) if done.exception and not isinstance(done.exception, SystemExit) else done.output
    )


def test_the_process_prints_no_traceback_and_exits_with_1(tmp_path):
    words = ["schema", "check", "none.csv", str(tmp_path / "none.yaml")]
    done = subprocess.run([sys.executable, "-m", "itemvec", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "itemvec: no table at none.csv\n"


def test_an_error_that_nobody_foresaw_is_one_line_too(monkeypatch, capsys):
    def fail():
        raise OSError("disk\nfull")

    monkeypatch.setattr(itemvec.cli, "cli", fail)
    with pytest.raises(SystemExit):
        itemvec.cli.main()
    assert capsys.readouterr().err == "itemvec: OSError: disk full (ITEMVEC_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("ITEMVEC_TRACEBACK", "1")
    with pytest.raises(OSError, match="disk"):
        itemvec.cli.main()


def test_a_full_disk_is_named_as_that(monkeypatch, capsys):
    def fail():
        with Path("/dev/full").open("wb", buffering=0) as full:  # every write to it fails so
            full.write(b"x")

    monkeypatch.setattr(itemvec.cli, "cli", fail)
    with pytest.raises(SystemExit):
        itemvec.cli.main()
    assert "a disk is full: that of the registry, the runs" in capsys.readouterr().err


def test_brackets_in_a_table_are_no_markup(tmp_path):
    (tmp_path / "t.csv").write_text("id,[/b] x\n1,[/x]\n2,[/x]\n")
    (tmp_path / "s.yaml").write_text("name: t\nid: id\nfeatures: {'[/b] x': {kind: nominal}}")
    done = run("schema", "check", tmp_path / "t.csv", tmp_path / "s.yaml")
    assert "[/b] x" in done.stdout and "[/x]" in done.stdout


def test_embedding_a_table_that_lacks_a_column_says_which(registry, tmp_path):
    (tmp_path / "t.csv").write_text("id,colour\na,r\n")
    done = run("embed", "--table", tmp_path / "t.csv", "--registry", registry.url)
    assert "did you mean 'colour'?" in str(done.exception)


def test_an_error_may_choose_its_exit_status(monkeypatch, capsys):
    class Refused(ConfigError):
        exit_status = 3

    def fail():
        raise Refused("the gate said no")

    monkeypatch.setattr(itemvec.cli, "cli", fail)
    with pytest.raises(SystemExit) as stopped:
        itemvec.cli.main()
    assert stopped.value.code == 3 and capsys.readouterr().err == "itemvec: the gate said no\n"


def test_a_setting_that_is_no_yaml_is_a_mistake_in_how_the_command_is_called(tmp_path):
    (tmp_path / "s.yaml").write_text("name: a\nid: i\nfeatures: {x: {kind: text}}")
    done = run("train", "t.csv", "--schema", tmp_path / "s.yaml", "--set", "encoder.hidden=[64")
    assert done.exit_code == 2 and "the value in 'encoder.hidden=[64' is not YAML" in done.output
