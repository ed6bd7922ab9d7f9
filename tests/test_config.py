import sys

import commandline
import pytest
from click.testing import CliRunner

from itemvec.errors import ConfigError, ItemvecError
from service.cli import serve
from service.config import READ_ELSEWHERE, ServiceConfig, cores, misspelt


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch, tmp_path):
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_registry_is_in_the_data_folder_unless_named(tmp_path):
    assert ServiceConfig.read().registry == str(tmp_path / ".itemvec" / "registry")
    assert ServiceConfig.read(data_dir="data").registry == str(tmp_path / "data" / "registry")
    assert ServiceConfig.read(data_dir="data", registry="models").registry == str(tmp_path / "models")
    assert ServiceConfig.read(registry="s3://bucket/models").registry == "s3://bucket/models"


def test_arguments_win_over_the_environment_and_none_is_not_given(monkeypatch):
    monkeypatch.setenv("ITEMVEC_PORT", "9000")
    assert ServiceConfig.read(port=None).port == 9000
    assert ServiceConfig.read(port=9001).port == 9001


def test_redis_url_is_read_and_its_password_is_not_shown(monkeypatch):
    monkeypatch.setenv("REDIS_URL", "redis://:secret@redis.example/0")
    config = ServiceConfig.read()
    assert config.redis_url == "redis://:secret@redis.example/0"
    assert "secret" not in repr(config)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", "::"])  # noqa: S104
def test_without_keys_other_machines_are_kept_out(host):
    with pytest.raises(ConfigError, match=rf"host {host} .*ITEMVEC_API_KEYS_FILE"):
        ServiceConfig.read(host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_loopback_needs_no_keys(host):
    assert ServiceConfig.read(host=host).read_keys() == {}


def test_keys_come_with_their_scopes(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n\n0123456789abcdef read\nfedcba9876543210 read,write, admin\n")
    assert ServiceConfig.read(host="192.0.2.1", api_keys_file=file).read_keys() == {
        "0123456789abcdef": {"read"},
        "fedcba9876543210": {"read", "write", "admin"},
    }


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("short read", "line 1: a key has at least 16"),
        ("0123456789abcdef", "line 1: after the key come its scopes"),
        ("0123456789abcdef reed", "line 1: after the key come its scopes"),
        ("# none\n", "has none"),
    ],
)
def test_a_wrong_file_of_keys_is_told_without_the_key(tmp_path, content, told):
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError, match=told) as caught:
        ServiceConfig.read(api_keys_file=file)
    assert "0123456789abcdef" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prot": 80}, "there is no setting 'prot'"),
        ({"port": 0}, "port=0: Input should be greater than or equal to 1"),
        ({"api_keys_file": "nowhere"}, "nowhere cannot be read"),
        ({"ray_address": "auto"}, "set REDIS_URL"),
        ({"redis_maxmemory": "2xx"}, "redis_maxmemory='2xx': expected bytes, or a number with k, kb"),
        ({"redis_maxmemory": "gb"}, "redis_maxmemory='gb'"),
        ({"redis_maxmemory": "1.5gb"}, "redis_maxmemory='1.5gb'"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(given, told):
    with pytest.raises(ConfigError, match=told) as caught:
        ServiceConfig.read(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["0", "1000000", "64b", "100K", "100kb", "512M", "512mb", "2g", "2GB"])
def test_memory_is_said_as_redis_takes_it(size):
    assert ServiceConfig.read(redis_maxmemory=size).redis_maxmemory == size


def test_a_misspelt_variable_is_told_at_the_start_with_the_likely_name(monkeypatch):
    monkeypatch.setenv("ITEMVEC_MAX_INFLIGHT", "9")
    monkeypatch.setenv("ITEMVEC_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("ITEMVEC_REGISTRY", "nowhere")
    said = CliRunner().invoke(serve, catch_exceptions=True)
    assert said.stderr.splitlines() == [
        "itemvec: ITEMVEC_MAX_INFLIGHT is no setting and changes nothing; did you mean ITEMVEC_MAX_IN_FLIGHT?"
    ]
    assert isinstance(said.exception, ItemvecError)  # and the start goes on, to what is wrong with the registry


def test_variables_that_others_set_or_read_are_not_taken_for_misspelt_ones():
    kubernetes = [
        f"ITEMVEC_{service}{end}"
        for service in ("", "REDIS_", "SERVE_SVC_", "HEAD_SVC_", "CACHE_")
        for end in ("SERVICE_HOST", "SERVICE_PORT", "PORT_8000_TCP", "PORT_8000_TCP_ADDR", "SERVICE_PORT_SERVE")
    ]
    kubernetes += ["ITEMVEC_REDIS_PORT", "ITEMVEC_SERVE_SVC_PORT"]
    assert misspelt([*kubernetes, *commandline.variables(), "ITEMVEC_TRACEBACK", "REDIS_URL", "HOME"]) == {}
    assert READ_ELSEWHERE - {"ITEMVEC_TRACEBACK"} <= commandline.variables()


def test_a_replica_with_a_core_to_spare_encodes_in_two_threads(monkeypatch):
    monkeypatch.setattr("service.config.cores", lambda: 4)
    assert [ServiceConfig.read(replicas=n).threads_of_a_replica() for n in (1, 2, 3, 8)] == [2, 2, 1, 1]
    assert ServiceConfig.read(replicas=8, encode_threads=3).threads_of_a_replica() == 3


def test_there_are_as_many_replicas_as_cores_up_to_four_unless_it_is_said(monkeypatch):
    monkeypatch.delenv("ITEMVEC_REPLICAS", raising=False)

    def of_a_machine(count: int) -> tuple[int, int]:
        monkeypatch.setattr("service.config.cores", lambda: count)
        config = ServiceConfig.read()
        return config.number_of_replicas(), config.threads_of_a_replica()

    assert [of_a_machine(count) for count in (1, 2, 4, 6, 8, 64)] == [(1, 1), (2, 1), (4, 1), (4, 1), (4, 2), (4, 2)]
    assert ServiceConfig.read(replicas=7).number_of_replicas() == 7
    assert ServiceConfig.read(ray_address="auto", redis_url="redis://r").number_of_replicas() == 1


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 6),
        ({"pod/box": "max 100000"}, 6),
        ({"pod/box": "250000 100000"}, 2),
        ({"pod/box": "50000 100000"}, 1),
        ({"pod": "300000 100000", "pod/box": "max 100000"}, 3),
        ({"pod": "400000 100000", "pod/box": "200000 100000"}, 2),
        ({"other": "100000 100000"}, 6),
    ],
)
def test_cores_are_those_that_the_control_groups_allow(tmp_path, monkeypatch, limits, expected):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    membership, groups = tmp_path / "membership", tmp_path / "groups"
    membership.write_text("12:devices:/old\n0::/pod/box\n")
    for group, limit in limits.items():
        (groups / group).mkdir(parents=True, exist_ok=True)
        (groups / group / "cpu.max").write_text(limit + "\n")
    assert cores(groups, membership) == expected


def test_a_container_finds_its_limit_at_the_root_that_it_sees(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    (tmp_path / "membership").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cores(tmp_path, tmp_path / "membership") == 1


def test_without_control_groups_the_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 4}, raising=False)
    (tmp_path / "first").write_text("4:cpu:/box\n")
    expected = 3 if sys.platform == "linux" else 6
    assert cores(tmp_path, tmp_path / "first") == cores(tmp_path, tmp_path / "missing") == expected
