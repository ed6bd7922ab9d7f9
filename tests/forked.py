"""The command `itemvec` in a process that can be killed, forked from one that has imported what it needs: to import it
takes longer than most commands do."""

from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["training.cli", "training.retrain"])


def itemvec(*words: str) -> ForkServerProcess:
    process = FORKS.Process(target=_run, args=(words,), daemon=True)
    process.start()
    return process


def _run(words: tuple[str, ...]) -> None:
    from itemvec.cli import cli

    cli(words, standalone_mode=False)
