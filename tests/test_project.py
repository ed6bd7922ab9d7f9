"""The promises that the project makes about itself: what an import loads, what is pinned, and which commands exist."""

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path

import commandline
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WEB_AND_CLUSTER = {"fastapi", "prometheus_client", "ray", "redis", "starlette", "uvicorn"}
TRAINING = {"training", "matplotlib", "sklearn", "scipy"}


def modules(package: str) -> list[str]:
    files = [file for file in (ROOT / package).rglob("*.py") if file.name != "__main__.py"]
    return sorted(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files)


@cache
def loaded_by(*names: str) -> set[str]:
    """The top-level modules that a fresh Python has after importing `names`, where our settings are nonsense.

    Whatever reads a setting at import would refuse it, and whatever starts Ray would have it started.
    """
    script = (
        f"import sys, {', '.join(names)}\n"
        "ray = sys.modules.get('ray')\n"
        "assert ray is None or not ray.is_initialized()\n"
        "print(*sys.modules)"
    )
    nonsense = {"ITEMVEC_PORT": "no port", "REDIS_URL": "no url", "ITEMVEC_REGISTRY": "none://"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, **nonsense},
    )
    return {name.split(".")[0] for name in done.stdout.split()}


def test_itemvec_loads_neither_ray_nor_redis_nor_a_web_framework():
    assert not loaded_by(*modules("itemvec")) & (WEB_AND_CLUSTER | TRAINING | {"service"})


def test_service_loads_no_training_code():
    assert not loaded_by(*modules("service")) & TRAINING


def test_training_loads_no_service_code():
    assert not loaded_by(*modules("training")) & {"service", "redis", "fastapi"}


def test_help_needs_no_torch():
    assert not loaded_by("itemvec.cli") & {"torch", "pyarrow", "ray"}


def requirements() -> Iterator[Requirement]:
    for line in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        if not line.startswith(PROJECT["name"]):
            yield Requirement(line)


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normal(name): version for name, version in pins}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_each_dependency_is_pinned_within_its_range():
    pinned = constraints()
    for requirement in requirements():
        assert requirement.specifier.contains(Version(pinned[normal(requirement.name)])), requirement


def test_no_pin_is_of_a_local_build():
    assert [pin for pin in constraints().values() if Version(pin).local] == []


def test_the_version_is_said_once():
    import itemvec

    assert itemvec.__version__ == PROJECT["version"]


# Commands that documents tell people to type


def documented_commands() -> list[tuple[str, list[str]]]:
    """Lines of fenced and indented code that start with `make` or `itemvec`, with the file that has them."""
    found = []
    for file in [ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")]:
        fenced = False
        for line in file.read_text().splitlines():
            if line.startswith("```"):
                fenced = not fenced
            elif fenced or line.startswith("    "):
                # A comment, what comes after the command, and placeholders in capitals are the reader's.
                command = re.split(r"\s#|[|>&;\\]", line.strip().removeprefix("$ "))[0]
                words = shlex.split(command) if command.count("'") % 2 == 0 and command.count('"') % 2 == 0 else []
                if words[:1] in (["make"], ["itemvec"]):
                    found.append((file.relative_to(ROOT).as_posix(), words))
    return found


@pytest.mark.parametrize(("file", "words"), documented_commands(), ids=lambda value: str(value)[:70])
def test_commands_in_the_documents_exist(file, words):
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word} <= targets
        return
    commandline.check(words[1:])


def test_every_command_has_its_entry_point_and_its_help():
    from itemvec.cli import ORDER

    promised = set(PROJECT["entry-points"]["itemvec.commands"])
    assert {e.name for e in entry_points(group="itemvec.commands")} == promised
    for name in ORDER:
        command, _ = commandline.resolve([name])
        assert command.help, name


def test_make_lists_the_benchmarks_with_the_options_that_each_must_have():
    said = subprocess.run(["make", "bench"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"-m benchmarks\.(\w+) (.*)", said)
    assert [name for name, _ in lines] == sorted(file.stem for file in (ROOT / "benchmarks").glob("[a-z]*.py"))
    for name, options in lines:
        main = importlib.import_module(f"benchmarks.{name}").main
        assert {option.opts[0] for option in main.params if option.required} == set(re.findall(r"--\w+", options))


def test_make_help_names_every_target():
    targets = set(re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert targets - {"help"} == set(re.findall(r"^make ([a-z]+)", said, re.MULTILINE))
