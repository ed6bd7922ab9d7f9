"""Who switches the version of a model, and how far that is: leases and records of jobs, in Redis for all replicas."""

from service import scripts
from service.keys import Space
from service.link import Link


class Leases:
    def __init__(self, link: Link) -> None:
        self._link = link

    async def claim(self, name: str, holder: str, ttl: float) -> str:
        """Takes or renews the right to switch the model's version, for `ttl` seconds; returns who has it."""
        reply = await self._link.command("EVAL", scripts.CLAIM, 1, Space(name).switch, holder, int(ttl * 1000))
        return str(reply, "utf-8")

    async def renew(self, name: str, holder: str, ttl: float) -> bool:
        """Keeps that right for another `ttl` seconds. False if it ran out meanwhile: another one may have had it."""
        return bool(await self._link.command("EVAL", scripts.RENEW, 1, Space(name).switch, holder, int(ttl * 1000)))

    async def release(self, name: str, holder: str) -> None:
        """Gives that right back; does nothing if another one has it."""
        await self._link.command("EVAL", scripts.RELEASE, 1, Space(name).switch, holder)

    async def holder(self, name: str) -> str | None:
        """Who has that right now."""
        holder: bytes | None = await self._link.command("GET", Space(name).switch)
        return None if holder is None else holder.decode()

    async def save_job(self, job_id: str, record: bytes, ttl: float) -> None:
        await self._link.command("SET", f"iv:job:{job_id}", record, "PX", int(ttl * 1000))

    async def job(self, job_id: str) -> bytes | None:
        record: bytes | None = await self._link.command("GET", f"iv:job:{job_id}")
        return record
