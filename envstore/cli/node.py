"""``node``: one server for all mounts of a machine."""

from __future__ import annotations

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.holding import hold_here, metrics_option, patience_option
from envstore.errors import AccessDeniedError, UsageError


@click.command(
    cls=Command,
    examples="""
        envstore node                                serve until SIGTERM, log on the terminal
        envstore node --background
        envstore node --metrics 127.0.0.1:9464       with Prometheus metrics
        envstore node --targets /var/lib/kubelet     make mounts there for a CSI driver
        envstore node --fdstore /run/envstore/fdstore.sock     see: envstore fdstore --help
        envstore node --status                       what it serves, for which mounts
    """,
)
@click.option(
    "--socket",
    metavar="PATH",
    envvar="ENVSTORE_NODE_SOCKET",
    default="/run/envstore/node.sock",
    show_default=True,
    help="Where it listens, for root alone.",
)
@click.option(
    "--directory",
    metavar="DIR",
    default="/run/envstore/mnt",
    show_default=True,
    help="Where its file system is mounted; made if missing.",
)
@click.option(
    "--targets",
    multiple=True,
    metavar="DIR",
    help="Let who may use its sockets have mounts made below DIR. May be repeated.",
)
@click.option(
    "--fdstore",
    metavar="PATH",
    default="",
    help="Have the `envstore fdstore` at PATH keep what is needed when all of this is killed.",
)
@click.option("--background", is_flag=True, help="Return when it answers.")
@click.option(
    "--wait",
    is_flag=True,
    help="If one is serving there already, wait for its end and take its place, as one with "
    "--fdstore always does.",
)
@click.option("--status", is_flag=True, help="Ask the one that runs.")
@patience_option
@metrics_option
@click.pass_obj
def node(
    settings: Settings,
    socket: str,
    directory: str,
    targets: tuple[str, ...],
    fdstore: str,
    background: bool,
    wait: bool,
    status: bool,
    metrics: str,
    patience: float,
) -> None:
    """Serve all mounts of this machine from one process.

    As long as it runs, `envstore mount` as root uses it: mounts of one snapshot share everything,
    equal files of all snapshots share memory, and a mount of what is served already takes
    milliseconds. Other users may read such mounts where the files' modes let them. Stores are
    opened with the credentials of the environment that the node server is started in, unless
    whoever asks brings others.
    """
    import os

    if status:
        _print_status(settings, socket)
        return
    if os.geteuid() != 0:
        raise AccessDeniedError(
            "only root can serve a node", hint="as another user, mount without it: --node off"
        )
    settings.export_cache()
    from envstore.fuse.background import start_background
    from envstore.fuse.inheriting import prepare_places
    from envstore.fuse.keeping import MountRequest
    from envstore.fuse.mountinfo import resolve
    from envstore.fuse.records import RecordFiles

    request = MountRequest(
        "",
        "",
        directory,
        allow_other=True,
        node=os.path.abspath(socket),
        metrics=metrics,
        patience=patience,
        targets=[os.path.abspath(one) for one in targets],
        fdstore=os.path.abspath(fdstore) if fdstore else "",
    )
    if fdstore and background:
        raise UsageError(
            "--fdstore is for a node server that somebody starts again when it ends",
            hint="run it in the foreground of a service or container",
        )
    if not fdstore:  # else what is there may be what it goes on with
        if wait:
            RecordFiles(resolve(directory)).wait()
        prepare_places(request)
    if background:
        record = start_background(request)
        _print_started(settings, socket, record.mountpoint)
        return
    raise SystemExit(
        hold_here(
            settings, request, lambda record: _print_started(settings, socket, record.mountpoint)
        )
    )


def _print_started(settings: Settings, socket: str, mountpoint: str) -> None:
    if settings.json:
        output.result({"socket": socket, "mountpoint": mountpoint})
    else:
        output.summary(settings, f"serving this node at {socket}, on {mountpoint}")


def _print_status(settings: Settings, socket: str) -> None:
    from envstore.fuse.sockets import ask

    found = ask(socket, 10.0, ask="status")
    if settings.json:
        output.result(found)
        return
    if not found["mounts"]:
        output.note(settings, "nothing is mounted through it")
        return
    output.table(
        ("MOUNT POINT", "REF", "DIGEST", "SINCE", "READ", "FETCHED"),
        [
            (
                output.printable(one["mountpoint"]),
                output.printable(one["ref"]),
                f"@{one['digest'][:12]}",
                output.age(one["started"]),
                output.size(one["bytes_read"]),
                output.size(one["bytes_fetched"]),
            )
            for one in found["mounts"]
        ],
    )
