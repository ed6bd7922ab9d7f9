"""Waiting for the deployment, with what Ray Serve tells of it made up."""

import time

import pytest
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus

from itemvec.errors import ItemvecError
from service.app import APP
from service.cluster import _reason, wait_until_ready
from service.config import ServiceConfig

NOBODY = "http://127.0.0.1:9"
REASON = "The deployment failed to start 3 times in a row.\n  itemvec.errors.VersionCorrupt: toys@1 is damaged\n"


def told(status: ApplicationStatus, message: str = "") -> ServeStatus:
    deployment = DeploymentStatusOverview("UNHEALTHY", "REPLICA_STARTUP_FAILED", replica_states={}, message=message)
    overview = ApplicationStatusOverview(
        status=status, message="one of the deployments failed", last_deployed_time_s=0.0, deployments={"it": deployment}
    )
    return ServeStatus(applications={APP: overview})


@pytest.mark.parametrize(
    ("message", "said"),
    [(REASON, r"did not start: toys@1 is damaged$"), ("", r"did not start: one of the deployments failed$")],
)
def test_a_deployment_that_failed_is_told_at_once_with_its_reason(monkeypatch, message, said):
    monkeypatch.setattr(serve, "status", lambda: told(ApplicationStatus.DEPLOY_FAILED, message))
    began = time.monotonic()
    with pytest.raises(ItemvecError, match=said):
        wait_until_ready(ServiceConfig.read(start_seconds=60.0), NOBODY)
    assert time.monotonic() - began < 30


def test_one_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(serve, "status", lambda: told(ApplicationStatus.DEPLOYING))
    with pytest.raises(ItemvecError, match=r"not ready within 0\.2 s"):
        wait_until_ready(ServiceConfig.read(start_seconds=0.2), NOBODY)


def test_a_port_that_is_taken_while_ray_starts_is_said_with_a_way_out():
    haproxy = """RuntimeError: HAProxy crashed during startup: [NOTICE] (7) : haproxy version is 2.8.25
    [ALERT] (7) : Binding [h.cfg:43] for frontend http_frontend: cannot bind socket (Address already in use) for [::1:9]
    [ALERT] (7) : [haproxy.main()] Some protocols failed to start their listeners! Exiting."""
    said = _reason(haproxy, ServiceConfig(port=52365))
    assert said == "port 52365 was taken meanwhile, perhaps by a process of Ray's; choose another with --port"
    assert _reason("Traceback\n  itemvec.errors.ConfigError: no such thing\n", ServiceConfig()) == "no such thing"
