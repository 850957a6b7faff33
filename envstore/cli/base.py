"""How every command looks: global options before or after its name, examples in its help."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click

from envstore.cli.context import Settings


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Write an option that was given into the settings; the last one given wins."""
    settings = context.ensure_object(Settings)
    if value is None or value is False or value == 0 or parameter.name is None:
        return
    setattr(settings, parameter.name, value)


def _global_options() -> list[click.Option]:
    """Return fresh copies of the options that the group and every command take."""
    shared: dict[str, Any] = {"expose_value": False, "callback": _keep}
    return [
        click.Option(
            ["--store", "store"],
            metavar="URL",
            help="The store: file:///path, a path, or s3://bucket/prefix?endpoint=.. "
            "[env ENVSTORE_URL; else the user's own]",
            **shared,
        ),
        click.Option(
            ["--json", "json"],
            is_flag=True,
            help="One JSON object on stdout; a failure is one on stderr.",
            **shared,
        ),
        click.Option(
            ["-q", "--quiet", "quiet"],
            is_flag=True,
            help="No progress, notes or summaries.",
            **shared,
        ),
        click.Option(
            ["-v", "--verbose", "verbose"],
            count=True,
            help="Log to stderr, -vv in detail; show tracebacks.",
            **shared,
        ),
        click.Option(
            ["--cache-dir", "cache_dir"],
            metavar="DIR",
            type=click.Path(path_type=Path),
            help="Where fetched data is kept [env ENVSTORE_CACHE_DIR].",
            **shared,
        ),
        click.Option(
            ["--cache-size", "cache_size"],
            metavar="SIZE",
            help="Cap on that, for example 20G [env ENVSTORE_CACHE_SIZE].",
            **shared,
        ),
    ]


class _WithGlobalOptions(click.Command):
    """Adds the global options, and sets them apart in the help."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        super().__init__(*args, **kwargs)
        self._examples = examples
        self._global = _global_options()
        self.params += self._global

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with logging as the options say."""
        verbose = ctx.ensure_object(Settings).verbose
        if verbose:
            import logging

            from envstore.redaction import protect_logs

            level = logging.INFO if verbose == 1 else logging.DEBUG
            logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=level)
            protect_logs()
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options, then the global ones."""
        known = {id(option) for option in self._global}
        own: list[tuple[str, str]] = []
        common: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            # Arguments are explained in the text; newer versions of click would list them here.
            if isinstance(parameter, click.Argument):
                continue
            record = parameter.get_help_record(ctx)
            if record is not None:
                (common if id(parameter) in known else own).append(record)
        if own:
            with formatter.section("Options"):
                formatter.write_dl(own)
        with formatter.section("Global options"):
            formatter.write_dl(common)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are, one to a line."""
        if self._examples:
            with formatter.section("Examples"):
                for line in self._examples.strip().splitlines():
                    formatter.write(f"  {line.strip()}\n")


class Command(_WithGlobalOptions):
    """A command; ``examples`` holds one example to a line."""


class Group(_WithGlobalOptions, click.Group):
    """A command of commands."""

    # click has subcommands made with the class that is named here.
    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands first: who asks for a group's help looks for these."""
        self.format_commands(ctx, formatter)
        super().format_options(ctx, formatter)


class LazyGroup(Group):
    """A group whose commands are imported when they are wanted.

    ``modules`` maps the name of each command to the module that defines it, under the same name
    or, where that would hide a builtin, with ``_`` after it.
    """

    def __init__(self, *args: Any, modules: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table, which is that of a user's work."""
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        module = self._modules.get(cmd_name)
        if module is None:
            return None
        found = importlib.import_module(module)
        return cast(click.Command, getattr(found, cmd_name.replace("-", "_")))
