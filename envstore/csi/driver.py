"""Puts the driver together: which services it offers, with what behind them, until it is told to
stop."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from envstore.confinement.process import keep_capabilities, keep_to_itself, refuse
from envstore.confinement.programs import starts_programs
from envstore.csi.config import ConfigFile, DriverConfig, single_store
from envstore.csi.controller import ControllerService
from envstore.csi.events import PodEvents, Silent
from envstore.csi.here import ClusterHere
from envstore.csi.identity import IdentityService
from envstore.csi.metrics import Calls, Pages, Sources
from envstore.csi.namespaces import Namespaces
from envstore.csi.node import NodeService
from envstore.csi.nodeserver import NodeServer
from envstore.csi.options import DriverOptions, NodeOptions
from envstore.csi.pages import PageServer
from envstore.csi.policy import Policy
from envstore.csi.probing import driver_answers
from envstore.csi.proto import csi_pb2_grpc
from envstore.csi.publishing import Grants, Publisher
from envstore.csi.reconcile import Keeper
from envstore.csi.records import Publication, Records
from envstore.csi.registration import serve_registration
from envstore.csi.server import Server, Service, Signals
from envstore.csi.starting import Starter
from envstore.errors import AccessDeniedError, UsageError

_log = logging.getLogger("envstore.csi")

_PROBE_WITHIN = 2.0
_KEEPER_GRACE = 2.0


def run(options: DriverOptions) -> int:
    """Serve until SIGTERM or SIGINT; returns an exit status: 1 if the kubelet refuses the driver.

    Call from the main thread. Raises ``UsageError``, ``AccessDeniedError`` and whatever keeps a
    node server from starting, all of it before anybody is answered. Ends the process if calls do
    not end in time.
    """
    refused: list[bool] = []
    with Signals() as signals, ExitStack() as stack:
        _start(options, stack)
        if options.register is not None:

            def refuse() -> None:
                refused.append(True)
                signals.stop()

            seen_as = options.kubelet_endpoint or options.path
            registration = serve_registration(options.register, seen_as, refuse)
            stack.callback(registration.stop, 1.0)
            _log.info("waiting for the kubelet at %s", registration.path)
        signals.wait()
        _log.info("stopping")
    return 1 if refused else 0


def _confine(options: DriverOptions) -> None:
    """Give up every privilege, unless a node server is to be started, which needs some."""
    keep_to_itself()
    if options.node is None or not options.node.start:
        keep_capabilities(())
        refuse(executing=not starts_programs())


def _start(options: DriverOptions, stack: ExitStack) -> None:
    """Serve all that is asked for, until ``stack`` is closed."""
    config = _Config(options)
    _confine(options)  # before there is another thread
    cluster = ClusterHere.find()
    policy = Policy(config, Namespaces(cluster) if cluster is not None else None)
    services: list[Service] = []
    node = None
    if options.node is not None:
        node = _Node(options.node, Grants(policy, options.credentials), cluster, stack)
        services.append(partial(csi_pb2_grpc.add_NodeServicer_to_server, node.service))
    if options.controller:
        controller = ControllerService(policy, options.credentials)
        stack.callback(controller.close)
        services.append(partial(csi_pb2_grpc.add_ControllerServicer_to_server, controller))
    ready = node.ready if node is not None else _always
    identity = IdentityService(ready, controller=options.controller)
    services.append(partial(csi_pb2_grpc.add_IdentityServicer_to_server, identity))
    calls = Calls()
    stack.callback(_stop, Server(options.path, services, observe=calls.observe))
    _log.info("serving at %s", options.path)
    if options.metrics:
        sources = Sources(
            node_id=options.node.id if options.node is not None else "",
            calls=calls,
            node=node.server if node is not None else None,
            published=node.records.all if node is not None else _nothing,
            problem=config.problem,
            answers=partial(driver_answers, options.path),
        )
        stack.callback(PageServer(options.metrics, Pages(sources)).close)


class _Config:
    """The configuration as it is at the moment, of a file or of one store."""

    def __init__(self, options: DriverOptions) -> None:
        self._file = ConfigFile(options.config) if options.config is not None else None
        self._fixed = single_store(options.url)

    def __call__(self) -> DriverConfig:
        return self._file() if self._file is not None else self._fixed

    def problem(self) -> str:
        return self._file.problem if self._file is not None else ""


class _Node:
    """The Node service and what is behind it; ``stack`` ends it all."""

    def __init__(
        self, options: NodeOptions, grants: Grants, cluster: ClusterHere | None, stack: ExitStack
    ) -> None:
        _claim(options.state, stack)
        if options.start:
            starter = Starter(options.state, options.targets)
            starter.start()
            stack.callback(starter.stop)
        self.server = NodeServer(options.socket)
        self.records = Records(options.state / "published")
        publisher = Publisher(self.records, self.server)
        events = PodEvents(cluster, options.id) if cluster is not None else Silent()
        stack.callback(events.close)
        keeper = Keeper(publisher, grants)
        keeper.start()
        stack.callback(keeper.stop, _KEEPER_GRACE)
        self.service = NodeService(options.id, publisher, grants, events)

    def ready(self) -> bool:
        """Whether calls of the service can be served: the node server answers."""
        return self.server.answers(_PROBE_WITHIN)


def _always() -> bool:
    return True


def _nothing() -> Iterable[Publication]:
    return ()


def _claim(state: Path, stack: ExitStack) -> None:
    """Keep other drivers from the state directory for as long as this one runs."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(state / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"another driver uses the state directory {state}", hint="wait for its end, or stop it"
        ) from None
    except OSError as error:
        raise AccessDeniedError(
            f"cannot use the state directory {state}: {error.strerror}"
        ) from error


def _stop(server: Server) -> None:
    if not server.stop():
        # Their threads would keep the process from ending by itself.
        _log.warning("calls do not end; what they began is seen to at the next start")
        logging.shutdown()
        os._exit(1)
