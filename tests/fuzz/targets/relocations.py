"""Plans of relocation, and files read by them."""

from __future__ import annotations

from envstore.store.relocated import Relocated, relocated_size
from envstore.store.relocation import Mode, Relocation, plan
from tests.fuzz.harness import expect, target

_OLD = b"/old/place/where/it/was/built"
_PREFIXES = (b"/new", b"/a much/longer/prefix than the one that it was built for" + b"/x" * 30)


def some_plans() -> list[Relocation]:
    """Return a plan of each sort."""
    texts = (
        (b"#!" + _OLD + b"/bin/python -E\nimport x\n" + _OLD + b"\n", Mode.TEXT),
        (b"a=" + _OLD + b"/lib\n" * 3, Mode.TEXT),
        (b"\0\1" + _OLD + b"/lib\0" + bytes(40) + _OLD + b":" + _OLD + b"\0\0", Mode.BINARY),
    )
    found = [plan(data, _OLD, mode, "openssl-3.3.1") for data, mode in texts]
    return [made for made in found if made is not None]


@target("relocation", lambda: [made.encode() for made in some_plans()])
def relocation(data: bytes) -> None:
    found = Relocation.decode(data)
    expect(found.encode() == data, "a plan is not what it was read from")
    for prefix in _PREFIXES:
        relocated = Relocated(found, prefix)
        expect(relocated.size == relocated_size(found, prefix), "two sizes of one file")
        expect(relocated.size < 1 << 80, "a size out of all bounds")
        for offset in (0, 1, 4000, relocated.size - 10):
            if offset >= 0:
                _read(relocated, offset)


def _read(relocated: Relocated, offset: int) -> None:
    size = 5000

    def stored(start: int, length: int) -> bytes:
        expect(0 <= start <= start + length <= relocated.stored, "stored bytes that are not there")
        expect(length < 64 << 20, f"{length} stored bytes for a range of {size}")
        return bytes(length)

    found = relocated.read(offset, size, stored)
    expect(len(found) == max(0, min(size, relocated.size - offset)), "a range of another length")
