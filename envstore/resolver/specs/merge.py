"""Makes one request of several: what all of them ask for, or an error where they contradict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from envstore.errors import UsageError
from envstore.resolver.request import CondaRequest, PypiRequest, Request

_T = TypeVar("_T")


def merged(requests: Sequence[Request]) -> Request:
    """Return the request for everything that ``requests`` ask for, in their order.

    Raises ``UsageError`` where only one can be followed.
    """
    if len(requests) == 1:
        return requests[0]
    return Request(
        name=next((item.name for item in requests if item.name), ""),
        conda=_conda([item.conda for item in requests if item.conda.specs]),
        pypi=_pypi([item.pypi for item in requests]),
        python=",".join(dict.fromkeys(item.python for item in requests if item.python)),
        variables=_dicts([item.variables for item in requests], "the variable"),
        platforms=_platforms([item.platforms for item in requests]),
        virtual=_dicts([item.virtual for item in requests], "the virtual package"),
        exclude_newer=min(
            (item.exclude_newer for item in requests if item.exclude_newer), default=""
        ),
    )


def _conda(requests: Sequence[CondaRequest]) -> CondaRequest:
    return CondaRequest(
        specs=_joined(item.specs for item in requests),
        channels=_joined(item.channels for item in requests),
        priority=_one(requests, lambda item: item.priority, "channel priorities") or "strict",
    )


def _pypi(requests: Sequence[PypiRequest]) -> PypiRequest:
    hashes: dict[str, tuple[str, ...]] = {}
    for item in requests:
        for line, values in item.hashes.items():
            hashes[line] = tuple(dict.fromkeys((*hashes.get(line, ()), *values)))
    default = PypiRequest()
    strategies = [item for item in requests if item.index_strategy != default.index_strategy]
    return PypiRequest(
        requirements=_joined(item.requirements for item in requests),
        constraints=_joined(item.constraints for item in requests),
        overrides=_joined(item.overrides for item in requests),
        default_index=_one(requests, lambda item: item.default_index, "default indexes"),
        indexes=_joined(item.indexes for item in requests),
        find_links=_joined(item.find_links for item in requests),
        no_index=any(item.no_index for item in requests),
        index_strategy=_one(strategies, lambda item: item.index_strategy, "index strategies")
        or default.index_strategy,
        prerelease=_one(requests, lambda item: item.prerelease, "settings for prereleases"),
        only_binary=_joined(item.only_binary for item in requests),
        no_binary=_joined(item.no_binary for item in requests),
        require_hashes=any(item.require_hashes for item in requests),
        hashes=hashes,
    )


def _joined(groups: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for group in groups for item in group))


def _one(items: Sequence[_T], get: Callable[[_T], str], what: str) -> str:
    values = list(dict.fromkeys(filter(None, map(get, items))))
    if len(values) > 1:
        raise UsageError(
            f"the specifications name different {what}: {', '.join(values)}",
            hint="they are resolved together, so they must agree",
        )
    return values[0] if values else ""


def _dicts(groups: Sequence[dict[str, str]], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for group in groups:
        for name, value in group.items():
            if found.setdefault(name, value) != value:
                raise UsageError(f"the specifications set {what} {name} to different values")
    return found


def _platforms(groups: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    limits = [group for group in groups if group]
    if not limits:
        return ()
    common = tuple(item for item in limits[0] if all(item in group for group in limits))
    if not common:
        raise UsageError("the specifications have no platform in common")
    return common
