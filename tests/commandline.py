"""Checks a command line of ours against the commands that exist, without running it."""

from collections.abc import Sequence

import click

from itemvec.cli import cli


def resolve(words: Sequence[str]) -> tuple[click.Command, list[str]]:
    """The command that `itemvec WORD...` names, and the words that are left for it."""
    command: click.Command = cli
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, f"there is no command {rest[0]!r}"
        command, rest = found, rest[1:]
    return command, rest


def check(words: Sequence[str]) -> None:
    """Fails if `itemvec WORD...` names a command or an option that does not exist, or has a word too many."""
    command, rest = resolve(words)
    options = {o: p for p in command.params for o in (*p.opts, *p.secondary_opts) if p.param_type_name == "option"}
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    flags = {"-h", "--help", "--version"}
    given = 0
    while rest:
        word, *rest = rest
        if word == "--":  # of `itemvec schedule`: what follows is for `itemvec retrain`
            check(["retrain", *rest])
            break
        name, equals, _ = word.partition("=")
        if not word.startswith("-"):
            given += 1
        elif name not in flags:
            assert name in options, f"itemvec {' '.join(words)}: there is no option {name}"
            if not equals and not getattr(options[name], "is_flag", False):
                rest = rest[1:]
    most = sum(1_000_000 if a.nargs < 0 else a.nargs for a in arguments)
    least = sum(1 for a in arguments if a.required)
    if not flags & set(words) and not isinstance(command, click.Group):
        assert least <= given <= most, f"itemvec {' '.join(words)}: {given} arguments for {least} to {most}"


def variables() -> set[str]:
    """Environment variables that options are read from."""
    context, found = click.Context(cli), set[str]()
    commands = [cli.get_command(context, name) for name in cli.list_commands(context)]
    while commands:
        command = commands.pop()
        assert command is not None
        if isinstance(command, click.Group):
            commands += command.commands.values()
        found |= {option.envvar for option in command.params if isinstance(option.envvar, str)}
    return found
