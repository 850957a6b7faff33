"""What checkpoints are made of: values, tables, slots, and what a trainer and a persister say."""

from __future__ import annotations

import json
from typing import Any

from envstore.checkpoint import encoding, slotformat, table
from envstore.checkpoint.layout import CheckpointId, Orders, StagedFile
from envstore.checkpoint.slotformat import CONTROL_BYTES, Control, ControlWords, Header
from envstore.checkpoint.structure import SavedStructure, has_refs, refs_of
from envstore.checkpoint.talking import Lines
from envstore.errors import EnvstoreError
from envstore.store.digest import digest
from envstore.store.safetensors import tensor_cuts
from tests.fuzz.harness import expect, target
from tests.fuzz.mutating import mutate_json

_WORDS = tuple(
    f'{{"$":"{tag}","v":'.encode()
    for tag in ("dict", "odict", "tuple", "set", "int", "float", "complex", "bytes", "slice",
                "range", "number", "npdtype", "str", "stateful", "object", "tensor")
)  # fmt: skip
_VALUE = {
    "step": 7, "list": [1, 2.5, None, True, "x"], (1, 2): {3, 4}, "big": 1 << 80,
    "nan": float("nan"), "bytes": b"\0\1", "c": 1 + 2j, "r": range(3), "s": slice(1, None),
    "frozen": frozenset({"a"}), "t": ("a", ["b"]),
}  # fmt: skip


def _value_seeds() -> list[bytes]:
    return [encoding.dumps(encoding.Encoder().encode(_VALUE)), b'{"$":"range","v":[0,9,1]}']


@target("encoded-value", _value_seeds, mutate_json, _WORDS)
def encoded_value(data: bytes) -> None:
    found = encoding.Decoder("a value").decode(encoding.loads(data, "a value"))
    written = encoding.dumps(encoding.Encoder().encode(found))
    encoding.Decoder("again").decode(encoding.loads(written, "again"))


def _table() -> dict[str, Any]:
    tensor = ["weight", "float32", [4, 4], 100]
    part = ["bias", "float32", [8], 164, {"offsets": [0], "lengths": [4]}]
    other = ["far", "float32", [2], -1, {"owner": 1}]
    twin = ["tied", "float32", [4, 4], -1, {"owner": 1, "twin": ["model", "weight"]}]
    value = {"weight": {"$": "tensor", "n": "weight"}, "o": {"$": "object", "n": 0}}
    item = {
        "name": "model", "kind": "torch.nn.Linear", "value": value, "size": 200, "objects": 1,
        "tensors": [tensor, part, other, twin], "aliases": {"alias": "weight"},
    }  # fmt: skip
    facts = {"step": 7, "metrics": {"loss": 0.5}, "lineage": {}}
    return {"format": 1, "rank": 0, "world_size": 2, "facts": facts, "items": [item]}


@target("state-table", lambda: [json.dumps(_table()).encode()], mutate_json, _WORDS)
def state_table(data: bytes) -> None:
    found = table.parse_table(data, "state.json")
    for record in found.tensors:
        parts = record.path.split("/")
        expect(not record.path or not {"", ".", ".."} & set(parts), "a path that escapes")
    try:
        table.assemble([found])
    finally:
        for item in found.items.values():
            tree: Any = None  # nothing is trusted, so nothing is read of it
            try:
                value = SavedStructure(item, tree, trusted=False, values=True).decode(item.value)
            except EnvstoreError:
                continue
            has_refs(value)
            refs_of(value)


def _header() -> Header:
    orders = Orders(
        "file:///s", "team/run", CheckpointId(5, 1, 0), 0, 1, "2026-01-02T03:04:05+00:00",
        ("@abcd",), "", "raw", "why", {"loss": 0.5}, {"git": "x"},
    )  # fmt: skip
    files = (StagedFile("state.json", ((4096, 100),)), StagedFile("a/m.safetensors", ((0, 5),)))
    return Header(orders, files)


@target("slot-header", lambda: [slotformat.encode_header(_header())], mutate_json)
def slot_header(data: bytes) -> None:
    found = slotformat.decode_header(data, first=CONTROL_BYTES, end=1 << 20, what="slot 0")
    for file in found.files:
        expect(not file.path.startswith("/") and ".." not in file.path.split("/"), "a path")
        for start, length in file.segments:
            expect(not start or CONTROL_BYTES <= start <= start + length <= 1 << 20, "a segment")
    again = slotformat.encode_header(found)
    read = slotformat.decode_header(again, first=CONTROL_BYTES, end=1 << 20, what="slot 0")
    expect(slotformat.encode_header(read) == again, "a header is not read as written")


def _page_seeds() -> list[bytes]:
    page = bytearray(CONTROL_BYTES)
    words = ControlWords(memoryview(page))
    words.write(Control(3, 0, True, 8192, 100, digest(b"header")))
    words.set_state("staged")
    words.filled = 8192
    words.release()
    return [bytes(page[:128]), b""]


@target("slot-page", _page_seeds, words=(b"staged\0\0", b"durable\0", b"ESSLOT01"))
def slot_page(data: bytes) -> None:
    """The first bytes of a control page; the check in it is made right."""
    page = bytearray(data[:CONTROL_BYTES].ljust(CONTROL_BYTES, b"\0"))
    page[104:112] = digest(bytes(page[:8]) + bytes(page[32:104]))[:8]
    words = ControlWords(memoryview(page))
    size = 1 << 20
    words.state(size)
    found = words.read(size)
    if found is not None:
        expect(CONTROL_BYTES <= found.header_at <= size - found.header_bytes, "a header outside")
    expect(words.filled >= 0 and words.taken >= 0, "a negative word")
    words.release()


@target(
    "persister-lines",
    lambda: [b'{"ask":"flush","slot":1}\n{"ask":"state"}\n', b"{}\n" * 50],
    words=(b"\n", b'{"ask":', b"}\n"),
)
def persister_lines(data: bytes) -> None:
    lines = Lines()
    for at in range(0, len(data), 1000):
        for message in lines.feed(data[at : at + 1000]):
            expect(isinstance(message, dict), "a message that is no object")


def _safetensors_seeds() -> list[bytes]:
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [16, 20]},
        }
    ).encode()
    return [header, b"{}"]


@target("safetensors-header", _safetensors_seeds, mutate_json, (b'"data_offsets":[', b"[[[[["))
def safetensors_header(data: bytes) -> None:
    """A header, of the length it has, before 20 bytes of tensors."""
    head = len(data).to_bytes(8, "little") + data
    for size in (len(head), len(head) + 20, 1 << 62):
        cuts = tensor_cuts(head, size, 1 << 50)
        if cuts is not None:
            expect(cuts == sorted(set(cuts)) and cuts[-1] == size, "cuts that do not cover a file")
