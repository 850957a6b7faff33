"""What the cluster's administrator says: which stores there are, and who may use what of them.

One YAML file, as a mounted ConfigMap has it::

    stores:
      main:
        url: s3://envs/prod?endpoint=https://s3.example
        credentials: secret
    default: main
    policy:
      - namespaces: ["team-*"]
        stores: [main]
        refs: ["default/*", "team/*:prod-*"]

``credentials`` says whose keys open a store: ``node`` (those of the node server's environment, the
default), ``secret`` (files, see ``envstore.csi.credentials``) or ``volume`` (of a Secret that each
volume names). ``default`` is the store of volumes that name none; it may be left out where there
is one store only. What a rule of ``policy`` means is said in ``envstore.csi.policy``.

Everything is checked, nothing is guessed: a key that is not known is an error.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from envstore.csi.request import is_label, quoted
from envstore.errors import UsageError
from envstore.store.objects.url import FileLocation, S3Location, parse_url

Source = Literal["node", "secret", "volume"]
SOURCES: tuple[Source, ...] = ("node", "secret", "volume")

EVERYTHING = "*"
MODES = ("ro",)

_MOST_BYTES = 1 << 20
_MOST = 1000
_LONGEST = 300
_REF_GLOB = re.compile(r"[A-Za-z0-9._*?-]+/[A-Za-z0-9._*?-]+(?::[A-Za-z0-9._*?-]+)?")
_NAME_GLOB = re.compile(r"[a-z0-9.*?-]+")
_LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"(?:[a-z0-9][a-z0-9.-]{0,252}/)?(?=.)" + _LABEL_VALUE.pattern)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NamedStore:
    """A store that volumes may name. ``url`` holds no secret."""

    name: str
    url: str
    credentials: Source = "node"


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may use what: see ``envstore.csi.policy``. ``None``: this is no condition.

    ``labels`` are pairs of a label of the namespace and the values it may have.
    """

    namespaces: tuple[str, ...] | None = None
    labels: tuple[tuple[str, tuple[str, ...]], ...] | None = None
    service_accounts: tuple[str, ...] | None = None
    stores: tuple[str, ...] | None = None
    refs: tuple[str, ...] | None = None
    modes: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class DriverConfig:
    """The stores by name, the default one's name (empty: none) and the rules that grant."""

    stores: Mapping[str, NamedStore]
    default: str = ""
    rules: tuple[Rule, ...] = field(default=())


def single_store(url: str) -> DriverConfig:
    """Return what holds without a file: one store called ``default``, open to everybody."""
    return DriverConfig({"default": NamedStore("default", url)}, "default", (Rule(),))


def read_config(path: Path) -> DriverConfig:
    """Return what the file says. Raises ``UsageError`` with the file and the place in it."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{path} is larger than {_MOST_BYTES >> 20} MiB")
    try:
        return _Reader(str(path)).config(_yaml(data, str(path)))
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply") from error


class ConfigFile:
    """A configuration file that may change at any time, as a ConfigMap's files do.

    Whenever it is asked for, the file is looked at; if it is another one than before, it is read
    again. One that is broken, or gone, changes nothing: the last good one holds.
    """

    def __init__(self, path: Path) -> None:
        """Read it for the first time. Raises ``UsageError``."""
        self._path = path
        self._lock = threading.Lock()
        self._seen = _stamp(path)
        self._config = read_config(path)
        self.problem = ""
        """What is wrong with the file as it is now, in one line; empty if it is what holds."""

    def __call__(self) -> DriverConfig:
        """Return what holds now. Costs one system call where nothing has changed."""
        with self._lock:
            seen = _stamp(self._path)
            if seen != self._seen:
                self._seen = seen
                self._read()
            return self._config

    def _read(self) -> None:
        try:
            self._config = read_config(self._path)
        except UsageError as error:
            self.problem = str(error)
            _log.error("the last good configuration still holds: %s", error)
        else:
            self.problem = ""
            _log.info("the configuration is now what %s says", self._path)


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what tells one state of a file from another, behind whatever links lead to it."""
    try:
        found = os.stat(path)
    except OSError as error:
        return (error.errno or 0,)
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _yaml(data: bytes, path: str) -> Any:
    """Return the one YAML document of plain values. Refused are aliases and keys given twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event: Any = self.peek_event()  # type: ignore[no-untyped-call]
                raise yaml.MarkedYAMLError(
                    problem="aliases are not taken here", problem_mark=event.start_mark
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {quoted(str(key.value))} is given twice or is no word",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        loader = Loader(data.decode())
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}" if mark else ""
        what = error.problem or error.context or "it cannot be read"
        raise UsageError(f"{path}{place} is not YAML: {what}") from error
    except (yaml.YAMLError, ValueError) as error:
        what = quoted(str(error).partition("\n")[0])
        raise UsageError(f"{path} is not YAML: {what}") from error


class _Reader:
    """Turns what YAML says into values, and names the place of whatever is wrong."""

    def __init__(self, path: str) -> None:
        self._path = path

    def config(self, value: Any) -> DriverConfig:
        top = self._table(value, "", ("stores", "default", "policy"), ("stores", "policy"))
        stores = {
            str(name): self._store(name, said)
            for name, said in self._table(top["stores"], "stores").items()
        }
        if not stores:
            raise self._wrong("stores", "there is none")
        default = top.get("default", next(iter(stores)) if len(stores) == 1 else "")
        if default not in ("", *stores) or ("default" in top and not default):
            raise self._wrong("default", "is not the name of a store above")
        rules = tuple(
            self._rule(f"policy[{number}]", said, stores)
            for number, said in enumerate(self._list(top["policy"], "policy"))
        )
        return DriverConfig(stores, default, rules)

    def _store(self, name: object, value: Any) -> NamedStore:
        if not isinstance(name, str) or not is_label(name):
            shown = quoted(str(name))
            raise self._wrong("stores", f"{shown} is no name: use a-z, 0-9 and -, 63 at most")
        where = f"stores.{name}"
        said = self._table(value, where, ("url", "credentials"), ("url",))
        url = self._string(said["url"], f"{where}.url", 4096)
        if "://" not in url:
            raise self._wrong(f"{where}.url", "is no URL: write file:///.. or s3://..")
        if "@" in url:
            # Before anything that repeats a part of it in a message.
            raise self._wrong(f"{where}.url", "holds an @, as only credentials need (else %40)")
        try:
            location = parse_url(url)
        except UsageError as error:
            raise self._wrong(f"{where}.url", error.message) from error
        source = said.get("credentials", "node")
        if source not in SOURCES:
            raise self._wrong(f"{where}.credentials", f"is not one of {', '.join(SOURCES)}")
        if source != "node" and isinstance(location, FileLocation):
            raise self._wrong(f"{where}.credentials", "a store in a directory takes no keys")
        if source != "node" and isinstance(location, S3Location) and location.profile is not None:
            raise self._wrong(f"{where}.url", f"profile= means nothing with keys of the {source}")
        return NamedStore(name, location.url, cast(Source, source))

    def _rule(self, where: str, value: Any, stores: Mapping[str, NamedStore]) -> Rule:
        known = ("namespaces", "namespaceLabels", "serviceAccounts", "stores", "refs", "modes")
        said = self._table(value, where, known)
        if not said:
            raise self._wrong(where, 'has no condition: for everybody write namespaces: ["*"]')
        if "serviceAccounts" in said and not {"namespaces", "namespaceLabels"} & said.keys():
            # Whoever may make one in a namespace of his own may call it as he likes.
            raise self._wrong(f"{where}.serviceAccounts", "also say namespaces or namespaceLabels")

        def words(key: str, fits: Callable[[str], object], what: str) -> tuple[str, ...] | None:
            return self._words(said[key], f"{where}.{key}", fits, what) if key in said else None

        labels = None
        if "namespaceLabels" in said:
            labels = self._labels(said["namespaceLabels"], f"{where}.namespaceLabels")
        return Rule(
            words("namespaces", _NAME_GLOB.fullmatch, "a name or glob of a namespace"),
            labels,
            words("serviceAccounts", _NAME_GLOB.fullmatch, "a name or glob of a service account"),
            words("stores", lambda name: name in (EVERYTHING, *stores), "a store above or '*'"),
            words("refs", _is_ref_glob, "namespace/name[:tag] with * and ?, or '*'"),
            words("modes", MODES.__contains__, f"one of {', '.join(MODES)}"),
        )

    def _labels(self, value: Any, where: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
        found = []
        for key, wanted in self._table(value, where).items():
            if not isinstance(key, str) or _LABEL_KEY.fullmatch(key) is None:
                raise self._wrong(where, f"{quoted(str(key))} is not the name of a label")
            values = wanted if isinstance(wanted, list) else [wanted]
            words = self._words(values, f"{where}.{key}", _LABEL_VALUE.fullmatch, "a label's value")
            found.append((key, words))
        if not found:
            raise self._wrong(where, "is empty")
        return tuple(found)

    def _words(
        self, value: Any, where: str, fits: Callable[[str], object], what: str
    ) -> tuple[str, ...]:
        found = self._list(value, where)
        if not found:
            raise self._wrong(where, "is empty, which nothing fits")
        for number, word in enumerate(found):
            if not fits(self._string(word, f"{where}[{number}]", _LONGEST)):
                raise self._wrong(f"{where}[{number}]", f"{quoted(word)} is not {what}")
        return tuple(found)

    def _table(
        self, value: Any, where: str, known: tuple[str, ...] = (), needed: tuple[str, ...] = ()
    ) -> dict[Any, Any]:
        if not isinstance(value, dict) or len(value) > _MOST:
            raise self._wrong(where, f"is not a table of at most {_MOST} keys")
        for key in value:
            if known and key not in known:
                shown = quoted(str(key))
                raise self._wrong(where, f"{shown} is not known, but {', '.join(known)} are")
        for key in needed:
            if key not in value:
                raise self._wrong(where, f"{key} is missing")
        return value

    def _list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > _MOST:
            raise self._wrong(where, f"is not a list of at most {_MOST}")
        return value

    def _string(self, value: Any, where: str, longest: int) -> str:
        if not isinstance(value, str):
            raise self._wrong(where, "is not a string (quote it)")
        if len(value) > longest:
            raise self._wrong(where, f"is longer than {longest}")
        return value

    def _wrong(self, where: str, what: str) -> UsageError:
        return UsageError(f"{self._path}: {where}: {what}" if where else f"{self._path}: {what}")


def _is_ref_glob(text: str) -> bool:
    return text == EVERYTHING or _REF_GLOB.fullmatch(text) is not None
