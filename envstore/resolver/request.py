"""What people ask for: the content of a specification file before anything is resolved."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that a request or a lock was read from: its name as given, and its SHA-256 in hex."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class CondaRequest:
    """Conda packages wanted: ``specs`` are MatchSpecs, ``channels`` names or URLs, first wins.

    ``channels`` hold no credentials. ``priority`` is ``strict`` or ``disabled``.
    """

    specs: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    priority: str = "strict"


@dataclass(frozen=True, slots=True)
class PypiRequest:
    """Python distributions wanted, each as a PEP 508 line whose paths and URLs are absolute.

    ``hashes`` are by requirement line (``sha256:...``). ``indexes`` come before ``default_index``
    (empty: uv's own); neither holds credentials. ``binary`` and ``source`` name the distributions
    (``:all:`` for all) that must, or must not, come as wheels.
    """

    requirements: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    default_index: str = ""
    indexes: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    no_index: bool = False
    index_strategy: str = "first-index"
    prerelease: str = ""
    only_binary: tuple[str, ...] = ()
    no_binary: tuple[str, ...] = ()
    require_hashes: bool = False
    hashes: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """Everything asked for, from one or several specification files.

    ``python`` is a PEP 440 specifier set for the interpreter, empty if any will do. ``variables``
    are environment variables to set on activation. ``platforms`` are conda subdirs the
    specification limits itself to (none: any). ``virtual`` are virtual packages it asks the
    system for, as ``name`` -> version. ``exclude_newer`` is an RFC 3339 time or empty.
    """

    name: str = ""
    conda: CondaRequest = CondaRequest()
    pypi: PypiRequest = PypiRequest()
    python: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    platforms: tuple[str, ...] = ()
    virtual: dict[str, str] = field(default_factory=dict)
    exclude_newer: str = ""
    sources: tuple[SourceFile, ...] = ()
