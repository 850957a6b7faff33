from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.resolver.packages.records import Row, read_record, write_record

PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1).filter(
    lambda path: not path.startswith("/")
)
ROWS = st.builds(Row.of, PATHS, st.binary(max_size=50)) | st.builds(Row, PATHS)


@given(st.lists(ROWS, unique_by=lambda row: row.path))
def test_rows_come_back(rows: list[Row]) -> None:
    written = write_record(rows)
    assert read_record(written) == {row.path: row for row in rows}
    assert write_record(reversed(rows)) == written
    assert [line[0] for line in csv.reader(io.StringIO(written.decode(), newline=""))] == sorted(
        row.path for row in rows
    )


def test_what_other_tools_write_is_read() -> None:
    text = (
        "a.py,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0\r\n"
        '"b, c.py",sha384=OLBgp1GsljhM2TJ-sbHjaiH9txEUvgdDTAzHv2P24donTt6_529l-9Ua0vFImLlb,0\n'
        "/abs.py,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU=,\n"
        "\n"
        "x.dist-info/RECORD,,\n"
        "only\n"
    )
    rows = read_record(text.encode())
    assert list(rows) == ["a.py", "b, c.py", "abs.py", "x.dist-info/RECORD", "only"]
    assert rows["a.py"].digest == rows["abs.py"].digest == Row.of("", b"").digest
    assert rows["b, c.py"].algorithm == "sha384"
    assert (rows["abs.py"].size, rows["only"].algorithm) == (-1, "")


@given(st.binary(max_size=200))
def test_anything_else_is_refused_in_words(data: bytes) -> None:
    try:
        read_record(data)
    except ValueError as error:
        assert "its RECORD" in str(error)  # noqa: PT017 - it may also be right


def test_weak_digests_are_refused() -> None:
    for algorithm in ("md5", "sha1", "", "crc"):
        with pytest.raises(ValueError, match=r"digest of a\.py that proves nothing"):
            read_record(f"a.py,{algorithm}=47DEQpj8,0\n".encode())


def test_a_path_with_an_end_of_line_stays_one_row() -> None:
    rows = [Row.of("a\r../../outside", b"x"), Row.of("b\nc", b"y"), Row("plain")]
    assert read_record(write_record(rows)) == {row.path: row for row in rows}
