import os
import subprocess
import sys
from pathlib import Path

import pytest

from itemvec.errors import ConfigError
from service.metrics import SECONDS, Incomplete, Metrics, exposition, node_snapshot
from service.problems import problem


def value(text: bytes, series: str) -> float | None:
    lines = [line for line in text.decode().splitlines() if line.startswith(series + " ")]
    return float(lines[0].split()[-1]) if lines else None


def count_in_a_process(directory: Path, code: str) -> None:
    """Runs `code`, which has a `metrics`, in a process that then ends, as a replica does that is killed."""
    program = (
        "import os, pathlib\nfrom service.metrics import Metrics\n"
        f"metrics = Metrics(pathlib.Path({str(directory)!r}))\n{code}\nos.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()


def test_a_request_is_counted_under_its_endpoint_method_and_status():
    metrics = Metrics()
    for status in (200, 200, 422):
        metrics.request("POST /v1/embeddings", status, 0.003, None)
    text = metrics.render()
    assert value(text, 'itemvec_requests_total{endpoint="/v1/embeddings",method="POST",status="200"}') == 2
    assert value(text, 'itemvec_requests_total{endpoint="/v1/embeddings",method="POST",status="422"}') == 1
    bucket = 'itemvec_request_seconds_bucket{endpoint="/v1/embeddings",le="%s",method="POST"}'
    assert (value(text, bucket % "0.0025"), value(text, bucket % "0.005")) == (0, 3)  # 2.5 ms < 3 ms < 5 ms


def test_names_of_ignored_columns_make_no_series_since_callers_choose_them():
    metrics = Metrics()
    metrics.columns("toys@1", [{"color": "oov", "tpyo": "ignored"}, {"color": "oov", "another": "ignored"}])
    text = metrics.render()
    assert value(text, 'itemvec_column_status_total{column="color",model="toys@1",status="oov"}') == 2
    assert value(text, 'itemvec_column_status_total{column="",model="toys@1",status="ignored"}') == 2
    assert b"tpyo" not in text


def test_the_info_of_a_model_moves_to_the_version_that_is_served():
    metrics = Metrics()
    metrics.model("toys", "toys@1", "aa")
    metrics.model("toys", "toys@2", "bb")
    text = metrics.render()
    assert value(text, 'itemvec_model_info{fingerprint="aa",model="toys",version="1"}') == 0
    assert value(text, 'itemvec_model_info{fingerprint="bb",model="toys",version="2"}') == 1


def test_nodes_are_added_up_and_a_model_is_still_served_once():
    one, two = Metrics(), Metrics()
    for metrics, items in ((one, 3), (two, 4)):
        metrics.encoded("toys@1", items, 0.001)
        metrics.model("toys", "toys@1", "aa")
    two.encoded("toys@2", 5, 0.001)  # a series that the first node lacks
    text = exposition([one.snapshot("a"), two.snapshot("b")])
    assert value(text, 'itemvec_items_encoded_total{model="toys@1"}') == 3 + 4
    assert value(text, 'itemvec_items_encoded_total{model="toys@2"}') == 5
    assert value(text, 'itemvec_encode_seconds_count{model="toys@1"}') == 2
    assert value(text, 'itemvec_model_info{fingerprint="aa",model="toys",version="1"}') == 1
    assert text.count(b"# TYPE itemvec_items_encoded_total counter") == 1


def test_what_killed_processes_counted_is_kept_and_what_they_were_doing_is_not(tmp_path):
    work = "metrics.request('GET /readyz', 200, 0.001, None); metrics.in_flight(1)"
    count_in_a_process(tmp_path, work)
    count_in_a_process(tmp_path, work)
    text = exposition([node_snapshot("here", tmp_path)])
    assert value(text, 'itemvec_requests_total{endpoint="/readyz",method="GET",status="200"}') == 2
    assert value(text, 'itemvec_request_seconds_count{endpoint="/readyz",method="GET"}') == 2
    assert not value(text, "itemvec_in_flight_requests")
    assert not list(tmp_path.glob("gauge_live*"))


def test_nothing_is_lost_when_a_file_grows(tmp_path):
    some = 500  # some 110 kB of counters, where a file begins with 64
    count_in_a_process(
        tmp_path,
        f"""
for _ in range(2):
    for i in range({some}):
        metrics.columns("toys@1", [{{f"column {{i}} {{'x' * 50}}": "oov"}}])
    metrics.request("GET /readyz", 200, 0.001, None)
for file in pathlib.Path({str(tmp_path)!r}).glob("counter_*.db"):
    assert file.stat().st_size > 65_536, file.stat()""",
    )
    text = exposition([node_snapshot("here", tmp_path)])
    counts = [
        line.split()[-1] for line in text.decode().splitlines() if line.startswith("itemvec_column_status_total{")
    ]
    assert counts == ["2.0"] * some
    assert value(text, 'itemvec_requests_total{endpoint="/readyz",method="GET",status="200"}') == 2


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0.0, "0.0005"), (0.0005, "0.0005"), (0.00051, "0.001"), (99.0, "+Inf")]
)
def test_a_time_is_counted_in_the_first_bucket_that_it_does_not_exceed(seconds, bucket):
    metrics = Metrics()
    metrics.request("GET /readyz", 200, seconds, None)
    series = 'itemvec_request_seconds_bucket{endpoint="/readyz",le="%s",method="GET"}'
    counts = {le: value(metrics.render(), series % le) for le in (*map(str, SECONDS), "+Inf")}
    assert next(le for le, count in counts.items() if count) == bucket


def test_a_folder_is_refused_where_the_process_does_not_write_to_it(tmp_path):
    with pytest.raises(ConfigError, match="PROMETHEUS_MULTIPROC_DIR was not set"):
        Metrics(tmp_path)


def test_an_incomplete_sum_is_answered_with_503_and_when_to_come_back():
    told = problem(Incomplete("a replica did not answer within 5 s"), "id")
    assert (told.status, told.headers["Retry-After"]) == (503, "1")
    assert told.body["detail"] == "the metrics are incomplete: a replica did not answer within 5 s"
