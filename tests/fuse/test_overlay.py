"""Fast mounts for real: which layer is asked for what, and that nothing is left behind."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from envstore.errors import AccessDeniedError, EnvstoreError
from envstore.fuse import overlay
from envstore.fuse.erofs import ensure_image
from envstore.fuse.mountinfo import find_mount
from envstore.fuse.overlay import examine, mount_fast, probe
from envstore.store.digest import digest
from tests.fuse import objects as objects_server
from tests.fuse.images import MANIFEST, compare, mounts_below
from tests.manifests import file, folder, must_find, tree_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount overlayfs")

CONTENTS = {
    b"bin/python": b"#!ELF" * 3000,
    b"lib/a.py": b"a = 1\n",
    b"lib/same.py": b"a = 1\n",
    b"lib/deep/er/b.py": b"b = 2\n" * 700,
    b"empty": b"",
}
FOLDERS = [folder(path) for path in (b"bin", b"lib", b"lib/deep", b"lib/deep/er")]


def place(top: Path, content: bytes) -> Path:
    name = digest(content).hex()
    return top / name[:2] / name


def put(top: Path, content: bytes) -> Path:
    path = place(top, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class Site:
    """A tree's image, its layers and where it is mounted."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.local, self.objects, self.target = (
            base / name for name in ("local", "objects", "target")
        )
        for path in (self.local, self.objects, self.target):
            path.mkdir()
        self.tree = tree_of(
            [*FOLDERS, *(file(path, data, chunk=1 << 20) for path, data in CONTENTS.items())]
        )
        self.image = ensure_image(self.tree, MANIFEST, base / "images")
        self.mounts: list[Path] = []

    def mount(self, objects: Path | None, target: Path | None = None) -> Path:
        target = target or self.target
        mount_fast(self.image, self.local, objects, target, source="envstore:some, [name]")
        self.mounts.append(target)
        return target

    def close(self) -> None:
        for target in reversed(self.mounts):
            subprocess.run(["umount", "--lazy", target], check=True)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()
    assert mounts_below(tmp_path) == []


class Server:
    """The FUSE server of ``objects.py`` over the site's contents."""

    def __init__(self, site: Site) -> None:
        self.mountpoint = site.base / "fuse"
        self.mountpoint.mkdir()
        self.log = site.base / "requests"
        script = objects_server.__file__
        command = [sys.executable, script, self.mountpoint, site.objects, self.log]
        self.process = subprocess.Popen(command)
        while not os.path.ismount(self.mountpoint):
            assert self.process.poll() is None
            time.sleep(0.01)

    def asked(self) -> list[str]:
        """Return the requests since the last call."""
        said = self.log.read_text().splitlines()
        self.log.write_text("")
        return said

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.kill()
        subprocess.run(["umount", "--lazy", self.mountpoint], check=True)


@pytest.fixture
def server(site: Site) -> Iterator[Server]:
    for content in CONTENTS.values():
        put(site.objects, content)
    made = Server(site)
    yield made
    made.close()


def cached(path: Path) -> int:
    """Return how many pages of a file are in memory."""
    size = path.stat().st_size
    with path.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), size, flags=mmap.MAP_PRIVATE, prot=3)
        pages = -(-size // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        library = ctypes.CDLL(None, use_errno=True)
        assert library.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) == 0
        return sum(one & 1 for one in found)


def test_the_probe_says_that_it_works_here(tmp_path: Path) -> None:
    assert probe(tmp_path / "cache") is None
    assert [finding.mend for finding in examine(tmp_path / "cache")] == [None] * 3
    assert os.listdir(tmp_path / "cache") == []
    assert mounts_below(tmp_path) == []


def test_the_whole_tree_is_there(site: Site) -> None:
    for content in CONTENTS.values():
        put(site.local, content)
    place = site.mount(None)
    top = os.open(place, os.O_RDONLY)
    try:
        compare(site.tree, top, attributes=False)
    finally:
        os.close(top)
    for path, content in CONTENTS.items():
        assert (place / os.fsdecode(path)).read_bytes() == content


def test_it_is_read_only_and_shows_its_source(site: Site) -> None:
    place = site.mount(site.objects)
    found = find_mount(str(place))
    assert found is not None
    assert (found.type, found.source) == (overlay.FILESYSTEM, "envstore:some, [name]")
    options = next(
        line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if f" {place} " in line
    )[5]  # fmt: skip
    assert {"ro", "nosuid", "nodev"} <= set(options.split(","))
    assert "noexec" not in options
    for change in ((place / "new").touch, (place / "empty").unlink):
        with pytest.raises(OSError, match="Read-only") as failure:
            change()
        assert failure.value.errno == errno.EROFS


def test_names_never_reach_the_objects(site: Site, server: Server) -> None:
    place = site.mount(server.mountpoint)
    server.asked()
    for path, _, names in os.walk(place):
        for name in names:
            os.stat(os.path.join(path, name))
        assert not os.path.exists(os.path.join(path, "missing.py"))
    assert (place / "empty").read_bytes() == b""
    assert server.asked() == []


def test_bytes_come_from_the_first_layer_that_has_them(site: Site, server: Server) -> None:
    put(site.local, CONTENTS[b"bin/python"])
    place = site.mount(server.mountpoint)
    server.asked()
    assert (place / "bin/python").read_bytes() == CONTENTS[b"bin/python"]
    assert server.asked() == []
    assert (place / "lib/deep/er/b.py").read_bytes() == CONTENTS[b"lib/deep/er/b.py"]
    name = digest(CONTENTS[b"lib/deep/er/b.py"]).hex()
    asked = server.asked()
    assert {f"lookup {name}", f"open {name}", f"read {name}"} <= set(asked)
    # What was read once, through whatever name, is in the kernel's memory.
    assert (place / "lib/a.py").read_bytes() == CONTENTS[b"lib/a.py"]
    server.asked()
    assert (place / "lib/same.py").read_bytes() == CONTENTS[b"lib/a.py"]
    assert not [line for line in server.asked() if line.startswith("read")]


def test_files_that_come_later_are_used_from_then_on(site: Site, server: Server) -> None:
    place = site.mount(server.mountpoint)
    (place / "lib/a.py").stat()
    put(site.local, CONTENTS[b"bin/python"])
    server.asked()
    assert (place / "bin/python").read_bytes() == CONTENTS[b"bin/python"]
    assert server.asked() == []


def test_what_is_local_outlives_the_server(site: Site, server: Server) -> None:
    for name in (b"bin/python", b"lib/a.py"):
        put(site.local, CONTENTS[name])
    place = site.mount(server.mountpoint)
    server.kill()
    assert (place / "bin/python").read_bytes() == CONTENTS[b"bin/python"]
    assert (place / "lib/same.py").read_bytes() == CONTENTS[b"lib/a.py"]
    assert sorted(os.listdir(place)) == ["bin", "empty", "lib"]
    assert (place / "bin/python").stat().st_size == 15_000
    with pytest.raises(OSError, match="not connected"):
        (place / "lib/deep/er/b.py").read_bytes()


def test_a_file_that_is_nowhere_is_an_error_and_no_more(site: Site) -> None:
    place = site.mount(site.objects)
    with pytest.raises(FileNotFoundError):
        (place / "lib/a.py").read_bytes()
    assert (place / "lib/a.py").stat().st_size == 6
    assert (place / "empty").read_bytes() == b""


def test_two_mounts_share_one_copy_in_memory(site: Site, tmp_path: Path) -> None:
    content = os.urandom(64 * 4096)
    tree = tree_of([file(b"shared", content, chunk=1 << 20)])
    other = tree_of([file(b"x", b"1"), file(b"elsewhere", content, chunk=1 << 20)])
    source = put(site.local, content)
    os.sync()
    fd = os.open(source, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    assert cached(source) == 0
    for number, found in enumerate((tree, other)):
        image = ensure_image(found, digest(b"%d" % number), tmp_path / "more images")
        target = tmp_path / f"mount {number}"
        target.mkdir()
        mount_fast(image, site.local, None, target, source="envstore:x")
        site.mounts.append(target)
    first, second = tmp_path / "mount 0/shared", tmp_path / "mount 1/elsewhere"
    assert cached(second) == 0
    assert first.read_bytes() == content
    assert cached(second) == cached(source) == 64
    # A mapping of one and a read of the other are the same pages too.
    assert second.read_bytes() == content


def test_removing_a_local_file_harms_nobody(site: Site) -> None:
    content = CONTENTS[b"bin/python"]
    put(site.objects, content)
    path = put(site.local, content)
    place = site.mount(site.objects)
    with (place / "bin/python").open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        path.unlink()
        assert opened.read() == content
        assert mapped[:] == content
    assert (place / "bin/python").read_bytes() == content
    Path("/proc/sys/vm/drop_caches").write_text("2")
    assert (place / "bin/python").read_bytes() == content


@pytest.mark.parametrize(
    "name", ["a:b", "a,b", "a\\b", "a b", "ü", "a\nb", "::", "n" * 250, ("n" * 200 + "/") * 15]
)
def test_awkward_paths(tmp_path: Path, name: str) -> None:
    base = tmp_path / name
    base.mkdir(parents=True)
    site = Site(base)
    try:
        put(site.local, CONTENTS[b"lib/a.py"])
        put(site.objects, CONTENTS[b"bin/python"])
        place = site.mount(site.objects)
        assert (place / "lib/a.py").read_bytes() == CONTENTS[b"lib/a.py"]
        assert (place / "bin/python").read_bytes() == CONTENTS[b"bin/python"]
    finally:
        site.close()


def test_relative_paths(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    put(site.local, CONTENTS[b"lib/a.py"])
    monkeypatch.chdir(site.base)
    image = site.image.relative_to(site.base)
    mount_fast(image, Path("local"), Path("objects"), "target", source="envstore:x")
    site.mounts.append(site.target)
    assert (site.target / "lib/a.py").read_bytes() == CONTENTS[b"lib/a.py"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda site: site.image.write_bytes(b"no image" * 1000),
        lambda site: site.image.unlink(),
        lambda site: site.local.rmdir(),
        lambda site: site.objects.rmdir(),
        lambda site: site.target.rmdir(),
    ],
)
def test_failures_leave_nothing_behind(site: Site, damage: Callable[[Site], object]) -> None:
    damage(site)
    threads = threading.active_count()
    with pytest.raises(EnvstoreError) as failure:
        mount_fast(site.image, site.local, site.objects, site.target, source="envstore:x")
    assert "\n" not in str(failure.value)
    assert mounts_below(site.base) == []
    assert threading.active_count() == threads
    loops = subprocess.check_output(["losetup", "-a"], text=True)
    assert str(site.base) not in loops


def test_killed_while_mounting(site: Site) -> None:
    put(site.local, CONTENTS[b"lib/a.py"])
    script = """
import os, sys, subprocess
from pathlib import Path
from envstore.fuse.overlay import _checked, mount_fast
image, local, objects, target = map(Path, sys.argv[1:])
print("ready", flush=True)
while True:
    mount_fast(image, local, objects, target, source="envstore:killed")
    _checked("umount2", os.fsencode(target), 2)
"""
    command = [sys.executable, "-c", script, site.image, site.local, site.objects, site.target]
    for number in range(20):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(number / 5000)
            process.kill()
        left = mounts_below(site.base)
        assert left in ([], [str(site.target)])
        if left:
            assert (site.target / "lib/a.py").read_bytes() == CONTENTS[b"lib/a.py"]
            subprocess.run(["umount", site.target], check=True)
    assert sorted(os.listdir(site.base)) == ["images", "local", "objects", "target"]


def test_who_is_not_root_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert probe(tmp_path) == "privileges: only root can mount EROFS and overlayfs"
    with pytest.raises(AccessDeniedError):
        mount_fast(tmp_path, tmp_path, None, tmp_path, source="envstore:x")


@pytest.mark.parametrize(
    ("kind", "says"),
    [("erofs", "EROFS: erofs: unknown"), ("overlay", "overlayfs: overlay: unknown")],
)
def test_a_kernel_that_lacks_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, says: str
) -> None:
    straight = overlay._Context

    def lacking(asked: str) -> overlay._Context:
        if asked == kind:
            raise overlay._CallError(f"{kind}: unknown", errno.ENODEV)
        return straight(asked)

    monkeypatch.setattr(overlay, "_Context", lacking)
    assert probe(tmp_path) == says
    assert examine(tmp_path)[-1].mend is not None
    assert os.listdir(tmp_path) == []


def test_two_mounts_of_one_image(site: Site, tmp_path: Path) -> None:
    put(site.local, CONTENTS[b"lib/a.py"])
    second = tmp_path / "second"
    second.mkdir()
    one, two = site.mount(None), site.mount(None, second)
    assert (one / "lib/a.py").read_bytes() == (two / "lib/a.py").read_bytes()
    node = must_find(site.tree, b"lib/a.py")
    assert (one / "lib/a.py").stat().st_nlink == site.tree.attributes(node).links
