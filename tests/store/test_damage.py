from __future__ import annotations

from pathlib import Path

import pytest

from envstore.errors import CorruptError, NotFoundError, UnsupportedFormatError
from envstore.store import canonical
from envstore.store.damage import (
    MAX_REASON,
    Damage,
    damage_key,
    damaged_packs,
    forget_damage,
    note_damage,
    read_damage,
)
from envstore.store.digest import digest
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

_ONE, _TWO = digest(b"1"), digest(b"2")


def test_packs_go_on_the_list_and_off_it(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        objects = store.repository.objects
        assert damaged_packs(objects) == frozenset()
        assert note_damage(objects, Damage(_ONE, "a bit has flipped", 1_700_000_000))
        assert note_damage(objects, Damage(_TWO, "é" * 10_000, 1))
        # Who found it first, and when, stays.
        assert not note_damage(objects, Damage(_ONE, "it is missing", 1_800_000_000))
        assert damaged_packs(objects) == {_ONE, _TWO}
        assert read_damage(objects, _ONE) == Damage(_ONE, "a bit has flipped", 1_700_000_000)
        assert len(read_damage(objects, _TWO).reason) == MAX_REASON
        forget_damage(objects, _ONE)
        forget_damage(objects, _ONE)
        assert damaged_packs(objects) == {_TWO}
        with pytest.raises(NotFoundError):
            read_damage(objects, _ONE)


def test_a_note_that_is_damaged_itself_still_keeps_its_pack_out(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        objects = store.repository.objects
        whole = Damage(_ONE, "why", 1).encode()
        for data in (b"", b"{}", whole[:-1], Damage(_TWO, "why", 1).encode()):
            objects.put(damage_key(_ONE), data)
            assert damaged_packs(objects) == {_ONE}
            with pytest.raises(CorruptError):
                read_damage(objects, _ONE)
        newer = {**canonical.decode(whole, "a note"), "format": 2}
        objects.put(damage_key(_ONE), canonical.encode_checked(newer))
        with pytest.raises(UnsupportedFormatError):
            read_damage(objects, _ONE)
        objects.put("damaged/something-else", b"")
        assert damaged_packs(objects) == {_ONE}
