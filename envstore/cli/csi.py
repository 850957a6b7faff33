"""``csi``: the Container Storage Interface driver, for volumes in pod specs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from envstore.cli.base import Group
from envstore.cli.context import Settings
from envstore.cli.csi_config import check_config
from envstore.cli.holding import metrics_option
from envstore.errors import UsageError

if TYPE_CHECKING:
    from envstore.csi.options import NodeOptions


@click.group(
    cls=Group,
    examples="""
        envstore csi serve --help                    how the driver is started
        envstore csi check-config stores.yaml        what its configuration means
    """,
)
def csi() -> None:
    """Serve snapshots as volumes of pods.

    This is what runs on the nodes of a cluster: a driver for Kubernetes, of the Container Storage
    Interface.
    """


csi.add_command(check_config)


@csi.command(
    examples="""
        envstore csi serve --endpoint unix:///csi/csi.sock --node-id "$NODE" --state-dir /state
        envstore csi serve ... --node-socket /run/envstore/node.sock     beside a node server
        envstore csi serve ... --register /registration                  without a sidecar
        envstore csi serve --endpoint unix:///csi/csi.sock --controller --config stores.yaml
    """,
)
@click.option(
    "--endpoint",
    metavar="unix:///PATH",
    envvar="CSI_ENDPOINT",
    show_envvar=True,
    required=True,
    help="The socket that the kubelet and sidecars call at.",
)
@click.option("--node-id", metavar="NAME", help="This node's name. Offers the Node service.")
@click.option(
    "--state-dir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where it records what is published here. Must outlive the driver.",
)
@click.option("--controller", is_flag=True, help="Offer the Controller service: StorageClasses.")
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Stores, and who may use what of them. Without it: --store, open to all.",
)
@click.option(
    "--credentials",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keys to stores, one directory for each: a mounted Secret.",
)
@click.option(
    "--node-socket",
    metavar="PATH",
    help="Use the node server there, and never start one.  [default: node.sock in the state "
    "directory]",
)
@click.option(
    "--start-node/--no-start-node",
    default=None,
    help="Whether to start a node server where none is.  [default: unless --node-socket is given]",
)
@click.option(
    "--targets",
    metavar="DIR",
    multiple=True,
    default=("/var/lib/kubelet",),
    show_default=True,
    help="Where a node server that it starts makes mounts. May be repeated.",
)
@click.option(
    "--register",
    metavar="DIR",
    help="Make itself known to the kubelet, in this plugins_registry directory.",
)
@click.option(
    "--kubelet-endpoint",
    metavar="PATH",
    help="Where the kubelet finds the socket of --endpoint, if not at the same path.",
)
@metrics_option
@click.pass_obj
def serve(
    settings: Settings,
    endpoint: str,
    node_id: str | None,
    state_dir: Path | None,
    controller: bool,
    config: Path | None,
    credentials: Path | None,
    node_socket: str | None,
    start_node: bool | None,
    targets: tuple[str, ...],
    register: str | None,
    kubelet_endpoint: str | None,
    metrics: str,
) -> None:
    """Serve as a CSI driver until SIGTERM.

    It is called csi.envstore.dev. With --node-id and --state-dir it publishes volumes on this
    node, as an unprivileged front of a node server (`envstore node --targets DIR`), which does the
    mounting and outlives it. With --controller it makes volumes of StorageClasses; both may be one
    process.

    Exit status: 0 after SIGTERM or SIGINT, 1 if it cannot serve, the kubelet refuses it or calls
    had to be cut off, 2 wrong usage.
    """
    import logging
    import os

    from envstore.redaction import protect_logs

    if not settings.verbose:
        logging.basicConfig(
            format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO
        )
        protect_logs()
    settings.export_cache()
    from envstore.csi.options import DriverOptions, check_seen, endpoint_path

    options = DriverOptions(
        path=endpoint_path(endpoint),
        url=settings.url,
        node=_node(node_id, state_dir, node_socket, start_node, targets),
        controller=controller,
        config=config,
        credentials=credentials,
        register=register and os.path.abspath(register),
        kubelet_endpoint=kubelet_endpoint and check_seen(kubelet_endpoint),
        metrics=metrics,
    )
    if options.node is None:
        if not controller:
            raise UsageError(
                "there is nothing to serve", hint="give --node-id and --state-dir, or --controller"
            )
        if register or node_socket or start_node:
            raise UsageError(
                "--register, --node-socket and --start-node are for a node",
                hint="give --node-id and --state-dir",
            )
    from envstore.csi.driver import run

    raise SystemExit(run(options))


def _node(
    node_id: str | None,
    state: Path | None,
    socket: str | None,
    start: bool | None,
    targets: tuple[str, ...],
) -> NodeOptions | None:
    """Return what concerns the node, ``None`` if it is not offered."""
    import os

    from envstore.csi.options import NodeOptions, check_node_id, own_socket

    if node_id is None and state is None:
        return None
    if node_id is None or state is None:
        raise UsageError("--node-id and --state-dir go together")
    if socket and start:
        raise UsageError("--start-node starts one in the state directory, not at --node-socket")
    state = state.absolute()
    return NodeOptions(
        id=check_node_id(node_id),
        state=state,
        socket=os.path.abspath(socket) if socket else own_socket(state),
        start=start if start is not None else not socket,
        targets=targets,
    )
