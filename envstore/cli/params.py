"""Arguments that several commands take, with their completion in the shell."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from envstore.cli.context import Settings
from envstore.errors import EnvstoreError

_PATIENCE_SECONDS = "2"
_OFFERED = 500

_Function = TypeVar("_Function", bound=Callable[..., Any])


class RefType(click.ParamType[str]):
    """A REF as typed; checked by whoever resolves it, completed from the store."""

    name = "REF"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer the store's refs; none if it does not answer soon."""
        # Whoever presses Tab would rather type on than wait for a store that is away.
        os.environ.setdefault("ENVSTORE_S3_TIMEOUT", _PATIENCE_SECONDS)
        try:
            found = _names(ctx.ensure_object(Settings), incomplete)
        except (EnvstoreError, OSError):
            return []
        return [CompletionItem(name) for name in found]


def _names(settings: Settings, incomplete: str) -> list[str]:
    from envstore.store.refs import DEFAULT_TAG, list_refs

    with settings.open(cached=False) as repository:
        names = sorted(list_refs(repository.objects))
    offered = []
    for name in names:
        text = str(name)
        # Tags only once a name is chosen, or where there is no tag to leave out.
        if name.tag == DEFAULT_TAG and ":" not in incomplete:
            text = text.removesuffix(f":{DEFAULT_TAG}")
        if text.startswith(incomplete):
            offered.append(text)
    return offered[:_OFFERED]


class ShareType(click.ParamType[float]):
    """A share such as ``5%`` or ``0.05``, as a number from 0 to 1."""

    name = "SHARE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the share, or fail."""
        match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)(%?)", value)
        share = float(match[1]) / (100 if match[2] else 1) if match else 2.0
        if share > 1:
            self.fail(f"{value!r} is not a share such as 5%", param, ctx)
        return share


class PathType(click.Path):
    """A path that is not empty: an unset variable in a script must not mean this directory."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        """Refuse an empty path, then do as ``click.Path``."""
        if not os.fspath(value):
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


class PrefixType(click.ParamType[str]):
    """An absolute path that need not be there, without / at its end."""

    name = "PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the path as ``check_prefix`` does."""
        from envstore.store.relocation import check_prefix

        prefix: str = os.path.normpath(value) if value.startswith("/") else value
        check_prefix(os.fsencode(prefix))
        return prefix


REF = RefType()


def ref_argument(name: str = "ref", **kwargs: Any) -> Callable[[_Function], _Function]:
    """Return a decorator that adds an argument of type REF."""
    return click.argument(name, metavar=name.upper(), type=REF, **kwargs)
