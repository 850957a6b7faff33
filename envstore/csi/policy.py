"""Who may use which store and which refs: deny by default.

A rule grants what fits all of its conditions, and one that fits is enough:

``namespaces``      globs on the pod's namespace
``namespaceLabels`` labels that the pod's namespace has, each with one of the values given
``serviceAccounts`` globs on the name of the pod's service account
``stores``          names of stores, or ``*``
``refs``            globs on ``namespace/name:tag``; each of the three is matched by itself, and
                    a tag that is left out may be any; ``*`` alone is every ref
``modes``           ``ro``

In globs ``*`` is any number of characters and ``?`` is one. A volume pinned to a digest is judged
by its ref, which the digest has to belong to; without a tag that is ``latest``.

Without pod information no rule that has one of the first three conditions grants anything. What
the kubelet says is believed, so the CSIDriver object has to say ``podInfoOnMount: true``: without
it a pod could claim to be another.

Labels come from the API server and are believed for some seconds. Whoever may label a namespace
grants it whatever rules grant to that label. Where the API server cannot tell, the answer is not
"no" but ``UNAVAILABLE``, so that the kubelet tries again and nobody loses a mount because of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

import grpc

from envstore.csi.config import EVERYTHING, DriverConfig, NamedStore, Rule
from envstore.csi.refusal import NAME, RefusedError, invalid
from envstore.csi.request import VolumeRequest
from envstore.errors import NotFoundError, UnavailableError

_READ_ONLY = "ro"
"""The mode of every volume."""

_log = logging.getLogger(__name__)


class NamespaceLabels(Protocol):
    """Where labels of namespaces are known, see ``envstore.csi.namespaces``."""

    def labels(self, namespace: str, within: float) -> Mapping[str, str]:
        """Return a namespace's labels. Raises ``UnavailableError``, ``NotFoundError``."""


@dataclass(frozen=True, slots=True)
class _Asking:
    """Who asks: empty is not known. ``any_account`` stands for whoever may come later."""

    namespace: str = ""
    account: str = ""
    any_account: bool = False

    def __str__(self) -> str:
        if not self.namespace:
            return "a volume without pod information"
        account = f" (service account {self.account})" if self.account else ""
        return f"namespace {self.namespace}{account}"


class Policy:
    """Decides by the configuration as it is at that moment. Safe for many threads."""

    def __init__(
        self, config: Callable[[], DriverConfig], namespaces: NamespaceLabels | None = None
    ) -> None:
        """Without ``namespaces`` (there is no API server) no rule with labels can be judged."""
        self._config = config
        self._namespaces = namespaces

    def check(self, request: VolumeRequest, within: float) -> NamedStore:
        """Return the store that ``request`` of a pod is granted.

        One question to the API server, of at most ``within`` seconds, and only where labels
        decide. Raises ``RefusedError``: ``PERMISSION_DENIED``, ``UNAVAILABLE`` (it cannot be
        told), ``INVALID_ARGUMENT`` (no store is named and there is no default).
        """
        pod = request.pod
        asking = _Asking(pod.namespace, pod.service_account) if pod else _Asking()
        return self._check(request, asking, within)

    def check_claim(self, request: VolumeRequest, namespace: str, within: float) -> NamedStore:
        """Return the store that a claim in ``namespace`` is granted to make a volume of.

        Which service accounts its pods will have is seen when they come. An empty ``namespace``
        is not known, and all is left to be seen then. Raises as ``check`` does.
        """
        if not namespace:
            return self._store(self._config(), request, _Asking())
        asking = _Asking(namespace, any_account=True)
        return self._check(request, asking, within)

    def _store(self, config: DriverConfig, request: VolumeRequest, asking: _Asking) -> NamedStore:
        name = request.store or config.default
        if not name:
            raise invalid("the volume attribute store is missing, and there is no default store")
        store = config.stores.get(name)
        if store is None:
            # The pod learns no more of it than of a store that it may not use.
            _log.warning("a volume names the store %s, which is not configured", name)
            raise _denied(name, request, asking)
        return store

    def _check(self, request: VolumeRequest, asking: _Asking, within: float) -> NamedStore:
        config = self._config()
        store = self._store(config, request, asking)
        fitting = [r for r in config.rules if _fits(r, store.name, request.ref, asking)]
        if any(rule.labels is None for rule in fitting):
            return store
        if fitting:
            labels = self._labels(asking.namespace, within)
            if any(_labelled(rule, labels) for rule in fitting):
                return store
        raise _denied(store.name, request, asking)

    def _labels(self, namespace: str, within: float) -> Mapping[str, str]:
        if self._namespaces is None:
            raise RefusedError(
                grpc.StatusCode.UNAVAILABLE,
                f"a rule for namespace {namespace} needs labels, and there is no API server here",
            )
        try:
            return self._namespaces.labels(namespace, within)
        except NotFoundError:
            return {}
        except UnavailableError as error:
            raise RefusedError.of(error) from None


def _fits(rule: Rule, store: str, ref: str, asking: _Asking) -> bool:
    """Return whether all conditions hold that can be judged without the API server."""
    return (
        (rule.stores is None or store in rule.stores or EVERYTHING in rule.stores)
        and (rule.refs is None or any(_ref_fits(glob, ref) for glob in rule.refs))
        and (rule.modes is None or _READ_ONLY in rule.modes)
        and (rule.labels is None or bool(asking.namespace))
        and _one_fits(rule.namespaces, asking.namespace)
        and (asking.any_account or _one_fits(rule.service_accounts, asking.account))
    )


def _one_fits(globs: tuple[str, ...] | None, name: str) -> bool:
    return globs is None or (bool(name) and any(fnmatchcase(name, glob) for glob in globs))


def _ref_fits(glob: str, ref: str) -> bool:
    return glob == EVERYTHING or all(map(fnmatchcase, _parts(ref), _parts(glob)))


def _parts(ref: str) -> tuple[str, str, str]:
    namespace, _, rest = ref.partition("/")
    name, _, tag = rest.partition(":")
    return namespace, name, tag or EVERYTHING


def _labelled(rule: Rule, labels: Mapping[str, str]) -> bool:
    return all(labels.get(key) in values for key, values in rule.labels or ())


def _denied(store: str, request: VolumeRequest, asking: _Asking) -> RefusedError:
    return RefusedError(
        grpc.StatusCode.PERMISSION_DENIED,
        f"{asking} may not use {request.ref} of store {store}: no rule allows it"
        f" (an administrator allows it under policy in the configuration of {NAME})",
    )
