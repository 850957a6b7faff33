"""What ``mount`` and ``node`` share: options of a server, and holding in the foreground."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from envstore.cli.context import Settings
from envstore.errors import EnvstoreError

if TYPE_CHECKING:
    from envstore.fuse.keeping import MountRequest
    from envstore.fuse.records import MountRecord

patience_option = click.option(
    "--timeout",
    "patience",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    envvar="ENVSTORE_READ_TIMEOUT",
    default=300.0,
    show_default=True,
    help="How long a read waits for a store that does not answer.",
)


def _check_metrics(context: click.Context, parameter: click.Parameter, address: str) -> str:
    if address:
        from envstore.fuse.prometheus import check_address

        check_address(address)
    return address


metrics_option = click.option(
    "--metrics",
    metavar="ADDRESS",
    default="",
    callback=_check_metrics,
    help="Serve Prometheus metrics on HOST:PORT or at the path of a socket.",
)


def hold_here(
    settings: Settings, request: MountRequest, mounted: Callable[[MountRecord], None]
) -> int:
    """Keep a mount in this process until it is gone; returns the exit status.

    ``mounted`` is called when it answers. Raises what keeps it from being made.
    """
    from envstore.fuse.background import hold
    from envstore.fuse.records import MountRecord
    from envstore.fuse.sockets import raised

    if not settings.verbose:
        import logging

        from envstore.redaction import protect_logs

        logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
        protect_logs()
    failed: list[EnvstoreError] = []

    def say(answer: dict[str, Any]) -> None:
        if "error" in answer:
            failed.append(raised(answer["error"]))
        else:
            mounted(MountRecord(**answer["mounted"]))

    status = hold(request, say)
    if failed:
        raise failed[0]
    return status
