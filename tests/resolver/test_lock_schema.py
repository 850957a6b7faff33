"""docs/lock.schema.json says of lock files what envstore itself says."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from envstore.errors import UnsupportedFormatError
from envstore.resolver.lock import Build, CondaPackage, LocalPython, Lock, PypiPackage
from envstore.resolver.lockfile import LockError, encode_lock, parse_lock
from envstore.resolver.request import CondaRequest, PypiRequest, Request, SourceFile
from tests.locks import full_lock, local_lock, locks

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "lock.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("lock", [full_lock(), local_lock(), Lock("linux-64", ())])
def test_what_is_written_fits(lock: Lock) -> None:
    VALIDATOR.validate(json.loads(encode_lock(lock)))


@settings(max_examples=60)
@given(locks())
def test_whatever_is_written_fits(lock: Lock) -> None:
    VALIDATOR.validate(json.loads(encode_lock(lock)))


@pytest.mark.parametrize(
    ("build", "path", "more"),
    [
        (Lock, (), {"format", "version"}),
        (Request, ("$defs", "request"), set()),
        (CondaRequest, ("$defs", "request", "properties", "conda"), set()),
        (PypiRequest, ("$defs", "request", "properties", "pypi"), set()),
        (SourceFile, ("$defs", "source"), set()),
        (CondaPackage, ("$defs", "conda"), {"kind"}),
        (PypiPackage, ("$defs", "pypi"), {"kind"}),
        (LocalPython, ("$defs", "python"), {"kind"}),
        (Build, ("$defs", "pypi", "properties", "build"), set()),
    ],
)
def test_the_schema_describes_every_field(
    build: type[Any], path: tuple[str, ...], more: set[str]
) -> None:
    described = SCHEMA
    for step in path:
        described = described[step]
    assert set(described["properties"]) == {item.name for item in fields(build)} | more
    for name, item in described["properties"].items():
        assert "description" in item or "$ref" in item or "const" in item, name


def changed(path: str, value: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(encode_lock(full_lock()))
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    at: Any = document
    for step in steps:
        at = at[step]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "pixi"),
        ("version", 2),
        ("platform", None),
        ("platform", "noarch"),
        ("request", None),
        ("more", 1),
        ("packages.0.kind", "deb"),
        ("packages.0.more", 1),
        ("packages.0.sha256", None),
        ("packages.0.sha256", "0"),
        ("packages.0.size", -1),
        ("packages.0.size", "1"),
        ("packages.0.name", "../a"),
        ("packages.0.url", "https://a.example/b.zip"),
        ("packages.0.url", "ftp://a.example/b.conda"),
        ("packages.0.python_site_packages_path", "lib/../../x"),
        ("packages.0.python_site_packages_path", "/lib"),
        ("packages.0.noarch", "perl"),
        ("packages.5.url", ""),
        ("packages.5.name", "Pandas"),
        ("packages.5.filename", "a/b-1-py3-none-any.whl"),
        ("packages.7.build.source", None),
        ("packages.7.build.sha256", "0"),
        ("virtual", {"glibc": "2"}),
        ("variables", {"A B": "2"}),
        ("request.conda.priority", "any"),
        ("request.pypi.no_index", 1),
        ("request.pypi.hashes", {"a": "sha256:0"}),
        ("sources.0.sha256", None),
    ],
)
def test_the_schema_and_the_reader_refuse_the_same(path: str, value: Any) -> None:
    document = changed(path, value)
    assert not VALIDATOR.is_valid(document)
    with pytest.raises((LockError, UnsupportedFormatError)):
        parse_lock(json.dumps(document).encode(), "x")


def test_the_schema_and_the_reader_take_fields_for_others() -> None:
    document = changed("x-note", ["anything"])
    document["packages"][0]["x-note"] = 1
    VALIDATOR.validate(document)
    assert parse_lock(json.dumps(document).encode(), "x") == full_lock()
