"""``completion``: the script that lets a shell complete commands, options and REFs."""

from __future__ import annotations

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import PROGRAM, Settings

_VARIABLE = "_ENVSTORE_COMPLETE"


@click.command(
    cls=Command,
    examples="""
        eval "$(envstore completion bash)"      in ~/.bashrc
        eval "$(envstore completion zsh)"       in ~/.zshrc, after compinit
        envstore completion fish > ~/.config/fish/completions/envstore.fish
    """,
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands in a shell.

    SHELL is bash (4.4 or newer), zsh or fish. REFs are completed from the store, if it answers
    within two seconds.
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise click.BadParameter(f"no completion for {shell}")
    script = found(context.find_root().command, {}, PROGRAM, _VARIABLE).source()
    if context.ensure_object(Settings).json:
        output.result({"shell": shell, "script": script})
        return
    output.line(script)
