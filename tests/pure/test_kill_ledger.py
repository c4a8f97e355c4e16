"""The judge of killed daemons: it tells what was lost, and by what."""

import pytest

from tests.kill.ledger import SECTOR, ZEROS, Ledger, Lost, sector_content


@pytest.fixture
def ledger() -> Ledger:
    """Sectors 0 and 1 acknowledged, 2 and 3 in flight, 4 to 7 never written."""
    ledger = Ledger(bytes(8 * SECTOR))
    for first, is_acknowledged in ((0, True), (2, False)):
        content = ledger.draft(first, 2)
        ledger.begin(first, content)
        if is_acknowledged:
            ledger.acknowledge(first, content)
    return ledger


def disk(ledger: Ledger, changes: dict[int, bytes]) -> bytes:
    """What the ledger says is there, but for some sectors."""
    found = bytearray(ledger.contents)
    for sector, content in changes.items():
        found[sector * SECTOR : (sector + 1) * SECTOR] = content
    return bytes(found)


def test_what_is_in_flight_may_be_old_or_new_sector_by_sector(ledger: Ledger) -> None:
    ledger.settle(disk(ledger, {3: sector_content(3, 2)}))
    assert ledger.contents[2 * SECTOR : 4 * SECTOR] == ZEROS + sector_content(3, 2)


def test_what_was_found_counts_from_then_on(ledger: Ledger) -> None:
    ledger.settle(disk(ledger, {3: sector_content(3, 2)}))
    with pytest.raises(Lost, match="sector 3 holds zeros; allowed: version 2 of sector 3"):
        ledger.settle(disk(ledger, {3: ZEROS}))


@pytest.mark.parametrize(
    ("sector", "content", "told"),
    [
        (0, ZEROS, "sector 0 holds zeros"),
        (0, sector_content(1, 1), "version 1 of sector 1"),
        (2, sector_content(2, 2)[:256] + bytes(256), "not ours .* and version 2 of sector 2"),
        (3, sector_content(2, 2), "version 2 of sector 2"),
        (4, b"stale bytes......" * 30 + b"..", "garbage"),
    ],
    ids=["lost", "another's", "torn", "in flight elsewhere", "garbage"],
)
def test_anything_else_is_told(ledger: Ledger, sector: int, content: bytes, told: str) -> None:
    with pytest.raises(Lost, match=told):
        ledger.settle(disk(ledger, {sector: content}))


def test_a_discard_is_a_hint(ledger: Ledger) -> None:
    ledger.begin(0, ZEROS)
    ledger.settle(disk(ledger, {}))
    ledger.begin(0, ZEROS)
    ledger.settle(disk(ledger, {0: ZEROS}))
