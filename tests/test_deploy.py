"""What deploy/ holds is checked against the schemas of the tools that read it, and against the code that it starts."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import commandline
import jsonschema
import kubernetes_validate
import numpy as np
import pytest
import redis
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter

from service.config import ServiceConfig
from service.redis_server import EmbeddedRedis
from service.store import Store

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"itemvec:{PROJECT['version']}"
KUBERNETES = "1.34"


def kubernetes_objects() -> list[Any]:
    objects = [
        (f"{file.stem}-{item['kind']}-{item['metadata']['name']}", item)
        for file in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        for item in yaml.safe_load_all(file.read_text())
    ]
    return [pytest.param(item, id=name) for name, item in objects]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [p.values[0] for p in kubernetes_objects() if p.values[0]["kind"] == kind]


# KubeRay's objects have no schema in Python, so the part that we use is written down here, strictly: from the reference
# of ray.io/v1 as of KubeRay 1.6 (its RayServiceSpec, RayJobSpec, RayClusterSpec and what they contain).


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class GroupSpec(Strict):
    rayStartParams: dict[str, str]  # noqa: N815 the names are Kubernetes'
    template: dict[str, Any]


class WorkerGroup(GroupSpec):
    groupName: str  # noqa: N815
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)  # noqa: N815
    maxReplicas: int = Field(ge=0)  # noqa: N815


class RayCluster(Strict):
    rayVersion: str  # noqa: N815
    authOptions: AuthOptions  # noqa: N815
    headGroupSpec: GroupSpec  # noqa: N815
    workerGroupSpecs: list[WorkerGroup] = []  # noqa: N815


class RayServiceSpec(Strict):
    serveConfigV2: str  # noqa: N815
    rayClusterConfig: RayCluster  # noqa: N815
    excludeHeadPodFromServeSvc: bool = False  # noqa: N815


class RayJobSpec(Strict):
    entrypoint: str
    rayClusterSpec: RayCluster  # noqa: N815
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"  # noqa: N815
    shutdownAfterJobFinishes: bool = False  # noqa: N815
    ttlSecondsAfterFinished: int = Field(default=0, ge=0)  # noqa: N815
    activeDeadlineSeconds: PositiveInt | None = None  # noqa: N815
    backoffLimit: int = Field(default=0, ge=0)  # noqa: N815


class Metadata(Strict):
    name: str | None = None
    generateName: str | None = None  # noqa: N815
    namespace: str
    labels: dict[str, str] = {}


class RayObject(Strict):
    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    metadata: Metadata


class RayService(RayObject):
    kind: Literal["RayService"]
    spec: RayServiceSpec


class RayJob(RayObject):
    kind: Literal["RayJob"]
    spec: RayJobSpec


RAY_OBJECT = TypeAdapter(Annotated[RayService | RayJob, Field(discriminator="kind")])


def ray_objects() -> list[RayService | RayJob]:
    """Those in the files, and the job in the ConfigMap that the timer creates."""
    found = [*of_kind("RayService"), *of_kind("RayJob")]
    found += [yaml.safe_load(text) for m in of_kind("ConfigMap") for key, text in m["data"].items() if "rayjob" in key]
    return [RAY_OBJECT.validate_python(item) for item in found]


def clusters() -> list[RayCluster]:
    return [
        item.spec.rayClusterConfig if isinstance(item, RayService) else item.spec.rayClusterSpec
        for item in ray_objects()
    ]


def pods() -> list[dict[str, Any]]:
    groups = [group for cluster in clusters() for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs)]
    return [group.template["spec"] for group in groups] + [
        of_kind("StatefulSet")[0]["spec"]["template"]["spec"],
        of_kind("Job")[0]["spec"]["template"]["spec"],
        of_kind("CronJob")[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"],
    ]


@pytest.mark.parametrize("item", kubernetes_objects())
def test_kubernetes_objects_follow_its_schemas(item):
    if item["apiVersion"] == "ray.io/v1":
        RAY_OBJECT.validate_python(item)
    else:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    assert item["metadata"].get("namespace", "itemvec") == "itemvec"


def test_pods_inside_ray_clusters_follow_the_schema_of_pods():
    groups = [group for cluster in clusters() for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs)]
    assert len(groups) >= 3
    for group in groups:
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group.template}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)


def test_a_service_and_a_job_are_there_and_both_ask_for_ray_s_token():
    assert {item.kind for item in ray_objects()} == {"RayService", "RayJob"}
    assert {cluster.authOptions.mode for cluster in clusters()} == {"token"}


def test_no_pod_runs_as_root_or_may_become_it():
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_volumes_secrets_and_settings_that_pods_name_are_there():
    claims = {c["metadata"]["name"] for c in of_kind("PersistentVolumeClaim")}
    settings = {c["metadata"]["name"] for c in of_kind("ConfigMap")}
    # Made by the commands in the README, since a secret does not belong in a file that is committed.
    secrets = set(re.findall(r"secret generic (\S+)", (DEPLOY / "README.md").read_text()))
    for pod in pods():
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "itemvec-registry") in claims
            assert volume.get("configMap", {}).get("name") in settings | {None}
            assert volume.get("secret", {}).get("secretName") in secrets | {None}
        for container in pod["containers"]:
            for source in container.get("envFrom", []):
                assert source.get("configMapRef", {}).get("name") in settings | {None}
                assert source.get("secretRef", {}).get("name") in secrets | {None}
            for variable in container.get("env", []):
                if "valueFrom" in variable:
                    assert variable["valueFrom"]["secretKeyRef"]["name"] in secrets
            claimed = {t["metadata"]["name"] for t in of_kind("StatefulSet")[0]["spec"]["volumeClaimTemplates"]}
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys() | claimed


def test_head_and_workers_get_the_same_settings():
    # Ray Serve reads them in every process of the cluster.
    for cluster in clusters():
        groups = [cluster.headGroupSpec, *cluster.workerGroupSpecs]
        sources = [group.template["spec"]["containers"][0]["envFrom"] for group in groups]
        assert all(source == sources[0] for source in sources)


def test_the_serve_config_is_valid_and_its_builder_can_be_imported():
    from ray.serve.schema import ServeDeploySchema

    (service,) = [item for item in ray_objects() if isinstance(item, RayService)]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service.spec.serveConfigV2))
    assert config.http_options.port == 8000
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_ray_in_the_manifests_is_the_ray_that_is_pinned():
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert {cluster.rayVersion for cluster in clusters()} == {pinned}


def test_the_timer_may_create_what_it_creates_and_nothing_else():
    (role,), (binding,), (timer,) = of_kind("Role"), of_kind("RoleBinding"), of_kind("CronJob")
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    pod = timer["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [(s["name"], s["namespace"]) for s in binding["subjects"]] == [(pod["serviceAccountName"], "itemvec")]
    file = Path(pod["containers"][0]["command"][-1])
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == str(file.parent)]
    (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
    (source,) = [m for m in of_kind("ConfigMap") if m["metadata"]["name"] == volume["configMap"]["name"]]
    assert file.name in source["data"]


# Compose


@pytest.fixture(scope="session")
def secrets(tmp_path_factory) -> Path:
    """A copy of deploy/ in which make-secrets was run."""
    folder = tmp_path_factory.mktemp("deploy")
    for name in ("make-secrets", "compose.yaml", "prometheus.yml", "itemvec.rules.yml"):
        (folder / name).write_bytes((DEPLOY / name).read_bytes())
    subprocess.run(["bash", str(folder / "make-secrets")], check=True, capture_output=True)
    return folder / "secrets"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """As Docker sees it where no variable is set."""
    text = (DEPLOY / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))


def test_compose_file_follows_the_specification(compose):
    schema = files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text()
    jsonschema.validate(compose, json.loads(schema))


def test_compose_publishes_only_the_service_and_only_on_loopback(compose):
    ports = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert ports == {"service": ["127.0.0.1:8000:8000"]}
    assert compose["networks"]["back"] == {"internal": True}


def test_compose_names_only_what_there_is(compose, secrets):
    for service in compose["services"].values():
        assert set(service.get("secrets", [])) <= compose["secrets"].keys()
        assert set(service.get("networks", [])) <= compose["networks"].keys()
        assert set(service.get("depends_on", [])) <= compose["services"].keys()
        for file in service.get("env_file", []):
            assert (secrets.parent / file).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]
    for secret in compose["secrets"].values():
        assert (secrets.parent / secret["file"]).is_file()


def test_every_image_of_ours_is_this_version_and_redis_is_the_same_everywhere(compose):
    images = [s["image"] for s in compose["services"].values()] + [c["image"] for p in pods() for c in p["containers"]]
    assert {image for image in images if "itemvec" in image} == {IMAGE}
    assert len({image for image in images if "redis" in image}) == 1
    assert not [image for image in images if ":" not in image or image.endswith(":latest")]
    assert IMAGE in (DEPLOY / "Containerfile").read_text()


# Secrets


def test_secrets_are_made_once_and_closed_to_others(secrets):
    before = {file.name: file.read_bytes() for file in secrets.iterdir()}
    subprocess.run(["bash", str(secrets.parent / "make-secrets")], check=True, capture_output=True)
    assert {file.name: file.read_bytes() for file in secrets.iterdir()} == before
    assert secrets.stat().st_mode & 0o077 == 0


def test_the_service_takes_the_keys(secrets):
    config = ServiceConfig.read(host="0.0.0.0", api_keys_file=secrets / "api_keys")  # noqa: S104
    admin = (secrets / "admin_key").read_text()
    scraper = (secrets / "prometheus_key").read_text()
    assert config.read_keys() == {admin: {"read", "write", "admin"}, scraper: {"read"}}


@pytest.fixture
def guarded(secrets, tmp_path) -> Iterator[tuple[EmbeddedRedis, str]]:
    """A Redis with the users of make-secrets, and the URL with which the service comes to it."""
    url = (secrets / "service.env").read_text().strip().removeprefix("REDIS_URL=redis://")
    with EmbeddedRedis(tmp_path) as server:
        root = redis.Redis.from_url(server.url)
        for line in sorted((secrets / "redis_users").read_text().splitlines(), key=lambda line: "default" in line):
            root.execute_command("ACL", "SETUSER", *line.split()[1:])
        yield server, server.url.replace("unix://", f"unix://{url.split('@')[0]}@")
        root.execute_command("ACL", "SETUSER", "default", "on")


@pytest.mark.anyio
@pytest.mark.parametrize("index", ["flat", "exact"])
async def test_redis_lets_the_service_do_its_work_and_nothing_beside_it(guarded, index):
    server, url = guarded
    async with Store(url, index=index) as store:
        await store.ping()
        await store.cache.write({"iv:enc:f1:{e00}:x": b"1"}, 5.0)
        assert await store.cache.read(["iv:enc:f1:{e00}:x"]) == [b"1"]
        await store.indexes.ensure("m", "f1", 2)
        await store.mark_live("m", "f1", "m@1")
        east, north = np.eye(2, dtype=np.float32)
        written = await store.put("m", ["a", "b"], [b"{}", b"{}"], {"f1": np.stack([east, north])})
        assert await store.add_vectors("m", "f1", ["a"], written.revs[:1], east[None]) == 1
        await store.mark_ready("m", "f1")
        assert await store.ready("m") == {"f1"}
        assert [n.id for n in await store.search("m", "f1", east, 1)] == ["a"]
        assert [n.id for n in await store.search_like("m", "f1", "a", 1)] == ["b"]
        assert (await store.indexes.status("m", "f1")).docs == 2
        assert [item.id async for batch in store.scan("m") for item in batch]
        assert await store.leases.claim("m", "me", 5.0) == "me"
        await store.leases.release("m", "me")
        await store.leases.save_job("j", b"{}", 5.0)
        assert await store.leases.job("j") == b"{}"
        assert await store.delete("m", ["a"]) == [True]
        assert await store.count("m") == 1
        assert await store.indexes.reindex("m", "f1", "hnsw")
        await store.unmark_live("m", "f1")
        await store.indexes.drop("m", "f1")
    service = redis.Redis.from_url(url)
    for forbidden in ("FLUSHALL", "CONFIG GET dir", "ACL LIST", "KEYS *", "GET other", "SHUTDOWN"):
        with pytest.raises(redis.exceptions.NoPermissionError):
            service.execute_command(*forbidden.split())
    stranger = redis.Redis.from_url(server.url)
    with pytest.raises(redis.exceptions.AuthenticationError):
        stranger.get("iv:x")


def test_the_health_check_may_ping_and_nothing_else(guarded):
    server, _ = guarded
    checker = redis.Redis.from_url(server.url.replace("unix://", "unix://health:health@"))
    assert checker.ping()
    with pytest.raises(redis.exceptions.NoPermissionError):
        checker.get("iv:x")


# The container image


def test_the_image_copies_what_there_is_and_does_not_run_as_root():
    text = (DEPLOY / "Containerfile").read_text()
    for copy in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in copy.split()[:-1]), copy
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "10001"
    uids = {c["securityContext"].get("runAsUser") for c in pods() if "itemvec" in c["containers"][0]["image"]}
    assert uids == {10001}


def test_the_image_s_python_and_extras_are_the_project_s(tmp_path):
    text = (DEPLOY / "Containerfile").read_text()
    python = re.search(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE)[1]
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    extras = re.search(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)[1]
    script = re.search(r'RUN python -c "(.*?)" \\\n', text, re.DOTALL)[1].replace("\\\n", "\n")
    listed = subprocess.run(
        [sys.executable, "-c", re.sub(r"\n\s+", " ", script)],
        cwd=ROOT, env={**os.environ, "EXTRAS": extras}, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    wanted = [*PROJECT["dependencies"], *(d for e in extras.split(",") for d in PROJECT["optional-dependencies"][e])]
    assert listed == wanted


# What is started, and the settings it is started with


def started() -> list[tuple[str, list[str]]]:
    """Command lines of ours in deploy/, with where they stand."""
    image = re.search(r"^CMD (\[.*\])$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)[1]
    lines = [("Containerfile", json.loads(image))]
    lines += [("RayJob", shlex.split(item.spec.entrypoint)) for item in ray_objects() if isinstance(item, RayJob)]
    script = of_kind("Job")[0]["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    lines.append(("first model", shlex.split(script.splitlines()[-1])))
    composed = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    lines += [("compose", s["command"]) for s in composed.values() if s["image"] == IMAGE and "command" in s]
    for file in (DEPLOY / "cron", *sorted((DEPLOY / "systemd").iterdir())):
        for line in file.read_text().splitlines():
            if "bin/itemvec " in line and not line.startswith("#"):
                command = line[line.index("bin/itemvec ") :].split(">>")[0]
                lines.append((file.name, shlex.split(command)))
    return lines


@pytest.mark.parametrize(("where", "words"), started(), ids=lambda value: str(value)[:40])
def test_commands_that_are_started_exist(where, words):
    assert Path(words[0]).name == "itemvec"
    commandline.check(words[1:])


def variables() -> set[str]:
    text = "\n".join(file.read_text() for file in DEPLOY.rglob("*") if file.is_file() and "secrets" not in file.parts)
    return set(re.findall(r"\b((?:ITEMVEC|RAY_SERVE)_[A-Z_]*[A-Z])\b", text))


def test_settings_are_read_by_whom_they_are_meant_for(compose):
    ours = {f"ITEMVEC_{name.upper()}" for name in ServiceConfig.model_fields} | commandline.variables()
    # Those that only compose.yaml itself reads.
    ours |= set(re.findall(r"\$\{(\w+):-", (DEPLOY / "compose.yaml").read_text()))
    serve = Path(importlib.import_module("ray.serve._private.constants").__file__).read_text()
    for name in variables():
        assert name in ours if name.startswith("ITEMVEC") else f'"{name}"' in serve, name


def test_schedules_are_schedules():
    number = r"(\*|\d+)(/\d+)?"
    fields = rf"{number}( {number}){{4}}"
    assert re.fullmatch(fields, of_kind("CronJob")[0]["spec"]["schedule"])
    lines = [line for line in (DEPLOY / "cron").read_text().splitlines() if re.match(r"[\d*]", line)]
    assert lines
    assert all(re.match(fields + " ", line) for line in lines)
