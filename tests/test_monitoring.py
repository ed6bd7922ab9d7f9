"""The alerts, the dashboard and the scrapes in deploy/ are checked against the series that the service writes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import promql_parser
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from service.metrics import Metrics

DEPLOY = Path(__file__).parents[1] / "deploy"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Rule(Strict):
    alert: str
    expr: str
    for_: str = Field(alias="for", pattern=r"^\d+[smhd]$")
    labels: dict[str, str]
    annotations: dict[str, str]


class RuleGroup(Strict):
    name: str
    rules: list[Rule]


class RuleFile(Strict):
    groups: list[RuleGroup]


class StaticConfig(Strict):
    targets: list[str]


class Authorization(Strict):
    type: Literal["Bearer"]
    credentials_file: str


class ScrapeConfig(Strict):
    job_name: str
    metrics_path: str
    scrape_timeout: str = Field(pattern=r"^\d+s$")
    authorization: Authorization
    static_configs: list[StaticConfig]


class GlobalConfig(Strict):
    scrape_interval: str = Field(pattern=r"^\d+s$")
    evaluation_interval: str = Field(pattern=r"^\d+s$")


class PrometheusConfig(Strict):
    """The fields of Prometheus 3's configuration that we use."""

    global_: GlobalConfig = Field(alias="global")
    rule_files: list[str]
    scrape_configs: list[ScrapeConfig]


def rules() -> list[Rule]:
    (group,) = RuleFile.model_validate(yaml.safe_load((DEPLOY / "itemvec.rules.yml").read_text())).groups
    return group.rules


def declared() -> dict[str, set[str]]:
    """Series that the service writes -> their labels."""
    series = {}
    for metric in vars(Metrics()).values():
        if hasattr(metric, "_labelnames"):
            labels = set(metric._labelnames)
            name = metric._name
            if metric._type == "histogram":
                series |= {f"{name}_bucket": labels | {"le"}, f"{name}_count": labels, f"{name}_sum": labels}
            else:
                series[f"{name}_total" if metric._type == "counter" else name] = labels
    return series


def selectors(expression: object) -> Iterator[promql_parser.VectorSelector]:
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for part in ("lhs", "rhs", "expr", "vector_selector", "args"):
        child = getattr(expression, part, None)
        for inner in child if isinstance(child, list) else [child]:
            if inner is not None:
                yield from selectors(inner)


def checked_labels(expr: str) -> set[str]:
    """The labels that an expression groups by; fails if it asks for a series or a label that nobody writes."""
    known = {**declared(), "up": {"job", "instance"}}
    found = list(selectors(promql_parser.parse(expr)))
    assert found
    for selector in found:
        assert selector.name in known
        assert {matcher.name for matcher in selector.matchers.matchers} <= known[selector.name]
    grouping = re.findall(r"(?:by|on) \(([^)]*)\)", expr)
    labels = {label.strip() for labels in grouping for label in labels.split(",") if label.strip()}
    assert labels <= set().union(*(known[selector.name] for selector in found))
    return labels


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.alert)
def test_alerts_ask_for_series_and_labels_that_the_service_writes(rule):
    labels = checked_labels(rule.expr)
    told = set(re.findall(r"\$labels\.(\w+)", " ".join(rule.annotations.values())))
    assert told <= labels | {"instance"}, "an alert keeps only the labels that it groups by"


def test_unseen_labels_of_a_column_are_compared_with_those_of_its_own_week():
    (rule,) = [rule for rule in rules() if rule.alert == "ItemvecUnseenLabels"]
    now, week = " ".join(rule.expr.split()).split(" > on (model, column) 0.2 + ")
    assert now.count("[1h]") == 3 and now.replace("[1h]", "[1w]") == week


def test_the_dashboard_shows_every_series_of_the_service_and_no_other():
    board = json.loads((DEPLOY / "grafana.json").read_text())
    shown = set()
    for target in (target for panel in board["panels"] for target in panel["targets"]):
        found = {selector.name for selector in selectors(promql_parser.parse(target["expr"]))}
        labels = checked_labels(target["expr"]) or set().union(*(declared()[name] for name in found))
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels
        shown |= found
    assert {re.sub("_bucket$", "", name) for name in shown} == {
        metric._name + ("_total" if metric._type == "counter" else "")
        for metric in vars(Metrics()).values()
        if hasattr(metric, "_labelnames")
    }


def test_prometheus_scrapes_the_service_with_the_key_it_was_given():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    config = PrometheusConfig.model_validate(yaml.safe_load((DEPLOY / "prometheus.yml").read_text()))
    (scrape,) = config.scrape_configs
    ((target,),) = [static.targets for static in scrape.static_configs]
    host, port = target.split(":")
    assert host in compose["services"]
    assert port == compose["services"][host]["ports"][0].split(":")[-1]
    prometheus = compose["services"]["prometheus"]
    assert Path(scrape.authorization.credentials_file) in [Path("/run/secrets", s) for s in prometheus["secrets"]]
    mounted = {Path(volume.split(":")[1]) for volume in prometheus["volumes"]}
    assert {Path("/etc/prometheus", file) for file in config.rule_files} <= mounted
    assert {f'job="{scrape.job_name}"'} == set(re.findall(r'job="\w+"', (DEPLOY / "itemvec.rules.yml").read_text()))
