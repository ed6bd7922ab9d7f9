"""The shadow comparison: challenger and champion answer the same searches of the running service, before the switch."""

import time
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat

from itemvec.client import Client, ServiceProblem
from training.config import Settings
from training.gate import Check

K = 10
MIN_LATENCY_MS = 1.0
"""Below it a multiple of the champion's time says nothing."""


class ShadowConfig(Settings):
    items: NonNegativeInt = 200
    """Stored items whose neighbors are searched for with both; 0 leaves the comparison out."""

    overlap: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least share of the 10 nearest that both find; None only records it."""

    latency: PositiveFloat | None = None
    """Most that the 95th percentile of the challenger's searches may take, as a multiple of the champion's; None only
    records it."""


def compare_answers(
    client: Client, name: str, champion: int, challenger: int, ids: Sequence[str], config: ShadowConfig
) -> tuple[dict[str, Any], list[Check]]:
    """The figures, and the checks of what has a limit. `ids` that the store does not hold are left out.

    The two take turns, so that what else the machine does falls on both.
    """
    shared: list[float] = []
    taken: dict[int, list[float]] = {champion: [], challenger: []}
    for item_id in ids:
        found: list[set[str]] = []
        for version in (champion, challenger):
            began = time.perf_counter()
            try:
                answer = client.similar({"id": item_id, "k": K}, f"{name}@{version}")
            except ServiceProblem as problem:
                if problem.status == 404:  # deleted, or one that this version cannot encode
                    break
                raise
            taken[version].append(1000 * (time.perf_counter() - began))
            found.append({neighbor["id"] for neighbor in answer["neighbors"]})
        if len(found) == len(taken) and any(found):
            shared.append(len(found[0] & found[1]) / max(map(len, found)))
    if not shared:
        return {"items": 0}, []
    p95 = {version: float(np.percentile(times, 95)) for version, times in taken.items()}
    overlap = float(np.mean(shared))
    figures: dict[str, Any] = {
        "items": len(shared), "k": K, "overlap": overlap,
        "milliseconds": {
            f"{name}@{version}": {"p50": round(float(np.median(times)), 3), "p95": round(p95[version], 3)}
            for version, times in taken.items()
        },
    }  # fmt: skip
    checks = []
    if config.overlap is not None:
        checks.append(Check("shadow overlap@10", overlap, config.overlap))
    if config.latency is not None:
        most = config.latency * max(p95[champion], MIN_LATENCY_MS)
        checks.append(Check("shadow p95 milliseconds", p95[challenger], most, p95[champion], at_most=True))
    return figures, checks
