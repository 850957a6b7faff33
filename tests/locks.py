"""Locks for tests: one of everything a lock can hold, and generated ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from envstore.resolver.lock import Build, CondaPackage, LocalPython, Lock, PypiPackage
from envstore.resolver.request import CondaRequest, PypiRequest, Request, SourceFile

CHANNEL = "https://channel.example/main"
INDEX = "https://index.example/simple"


def conda(name: str, version: str = "1.0", build: str = "h0_0", **more: Any) -> CondaPackage:
    subdir = more.pop("subdir", "linux-64")
    filename = f"{name}-{version}-{build}.conda"
    values: dict[str, Any] = {
        "url": f"{CHANNEL}/{subdir}/{filename}",
        "sha256": sha256(filename),
        "size": 1000,
        "channel": CHANNEL,
    }
    return CondaPackage(name, version, build, subdir, **values | more)


def wheel(name: str, version: str = "1.0", **more: Any) -> PypiPackage:
    filename = more.pop("filename", f"{name.replace('-', '_')}-{version}-py3-none-any.whl")
    values: dict[str, Any] = {
        "url": f"https://files.example/{filename}",
        "sha256": sha256(filename),
        "size": 500,
    }
    return PypiPackage(name, version, filename, **values | more)


def sha256(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def full_lock() -> Lock:
    """Return a lock in which every field has a value that is not its default."""
    sources = (SourceFile("environment.yml", sha256("a")), SourceFile("reqs.txt", sha256("b")))
    request = Request(
        name="analysis",
        conda=CondaRequest(("python 3.11.*", "numpy >=2"), (CHANNEL,), "disabled"),
        pypi=PypiRequest(
            requirements=("pandas>=2", "demo[fast]>=1 ; python_version > '3.8'"),
            constraints=("six<2",),
            overrides=("idna==3.10",),
            default_index=INDEX,
            indexes=("https://other.example/simple",),
            find_links=("file:///srv/wheels",),
            no_index=True,
            index_strategy="unsafe-best-match",
            prerelease="allow",
            only_binary=(":all:",),
            no_binary=("demo",),
            require_hashes=True,
            hashes={"pandas>=2": ("sha256:" + sha256("p"),)},
        ),
        python=">=3.11",
        variables={"MODE": "one\ntwo"},
        platforms=("linux-64", "linux-aarch64"),
        virtual={"__cuda": "12.4"},
        exclude_newer="2026-01-01T00:00:00Z",
        sources=sources,
    )
    return Lock(
        platform="linux-64",
        packages=(
            conda(
                "python",
                "3.11.7",
                "h0_cpython",
                md5="0" * 32,
                build_number=3,
                constrains=("pypy <0",),
                depends=("libzlib >=1.2", "__glibc >=2.17"),
                python_site_packages_path="lib/python3.11/site-packages",
                extra={"license": "PSF", "timestamp": 17, "track_features": ["a", None, 1.5]},
            ),
            conda("libzlib", "1.3"),
            conda("x264", "1!164.3095", url=f"{CHANNEL}/linux-64/x264-1%21164.3095-h0_0.conda"),
            conda("tzdata", "2026a", noarch="generic", subdir="noarch", size=0),
            conda("numpy", "2.1.3", depends=("python >=3.11,<3.12.0a0",)),
            wheel(
                "pandas",
                "2.2",
                requires=("numpy>=1.26", "six ; extra == 'test'"),
                requires_python=">=3.9",
                requested=True,
            ),
            wheel("six", "1.17", size=0),
            wheel(
                "demo",
                "1.2+local.1",
                filename="Demo-1.2+local.1-1-cp311-cp311-linux_x86_64.whl",
                url="",
                direct="git+https://code.example/demo@1f2e#subdirectory=src",
                extras=("fast",),
                build=Build(
                    "https://files.example/demo-1.2.tar.gz",
                    sha256("demo"),
                    "hatchling.build",
                    ("hatchling==1.27",),
                ),
            ),
        ),
        virtual={"__glibc": "2.28", "__cuda": "12.4", "__unix": "0"},
        variables={"OMP_NUM_THREADS": "4"},
        request=request,
        tools={"envstore": "0.3.0", "py-rattler": "0.28.0", "uv": "0.13.8"},
        sources=sources,
    )


def local_lock() -> Lock:
    """Return a lock whose interpreter is taken from a machine."""
    python = LocalPython("3.11.2", sha256("python"), "lib/python3.11/site-packages", "pypy")
    return Lock("linux-aarch64", (python, wheel("click", "8.2"), conda("click", "8.1")))


_texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)
_lists = st.lists(_texts, max_size=3).map(tuple)
_digests = st.integers(0, (1 << 256) - 1).map(lambda number: f"{number:064x}")
_versions = st.from_regex(r"[0-9]{1,2}(\.[0-9]{1,3}){0,3}", fullmatch=True)
_names = st.from_regex(r"[a-z0-9]{1,8}(-[a-z0-9]{1,5}){0,2}", fullmatch=True)
_variables = st.dictionaries(st.from_regex("[A-Z_]{1,8}", fullmatch=True), _texts, max_size=3)
_virtual = st.dictionaries(st.from_regex("__[a-z]{1,8}", fullmatch=True), _versions, max_size=3)
_sources = st.lists(st.builds(SourceFile, _texts, _digests), max_size=2).map(tuple)
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | _texts
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)
_requests = st.builds(
    Request,
    name=_texts,
    conda=st.builds(CondaRequest, _lists, _lists, st.sampled_from(["strict", "disabled"])),
    pypi=st.builds(
        PypiRequest, _lists, _lists, _lists, _texts, _lists, _lists, st.booleans(),
        require_hashes=st.booleans(),
        hashes=st.dictionaries(_texts, _lists, max_size=2),
    ),
    python=_texts,
    variables=_variables,
    platforms=_lists,
    virtual=_virtual,
    exclude_newer=_texts,
    sources=_sources,
)  # fmt: skip


@st.composite
def _conda(draw: st.DrawFn) -> CondaPackage:
    return conda(
        draw(_names),
        draw(_versions),
        sha256=draw(_digests),
        size=draw(st.integers(0, 1 << 40)),
        build_number=draw(st.integers(0, 100)),
        depends=draw(_lists),
        constrains=draw(_lists),
        noarch=draw(st.sampled_from(["", "python", "generic"])),
        extra=draw(st.dictionaries(_texts, _json, max_size=3)),
    )


@st.composite
def _wheel(draw: st.DrawFn) -> PypiPackage:
    found = wheel(
        draw(_names),
        draw(_versions),
        sha256=draw(_digests),
        requires=draw(_lists),
        requires_python=draw(_texts),
        extras=draw(_lists),
        requested=draw(st.booleans()),
    )
    if not draw(st.booleans()):
        return found
    build = Build("https://files.example/a.tar.gz", draw(_digests), draw(_texts), draw(_lists))
    return replace(found, url="", build=build)


@st.composite
def locks(draw: st.DrawFn) -> Lock:
    """Generate complete locks."""
    packages = draw(st.lists(_conda() | _wheel(), max_size=6))
    unique = {(type(item), item.name): item for item in packages}
    return Lock(
        platform=draw(st.sampled_from(["linux-64", "linux-aarch64"])),
        packages=tuple(unique.values()),
        virtual=draw(_virtual),
        variables=draw(_variables),
        request=draw(_requests),
        tools=draw(st.dictionaries(_texts, _texts, max_size=3)),
        sources=draw(_sources),
    )
