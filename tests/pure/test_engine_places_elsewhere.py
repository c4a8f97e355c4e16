"""Places of encrypted images and in external data files: what the extent map does the engine would have done."""

import random
from typing import Any

import pytest

from tests.engine import Bench, noise, open_again, set_up
from tests.extents import DISCARD, KEEP, UNMAP, Plane, clear_by, write_by

pytestmark = pytest.mark.pure

CLUSTER = 4096
SIZE = 200 * CLUSTER
UNTIDY = noise(40 * CLUSTER) + bytes(90 * CLUSTER) + noise(20 * CLUSTER + 512)  # of a data file before


def started(**options: Any) -> tuple[Bench, Plane]:
    """An image with a table and clusters in stock, whose link log has begun."""
    bench = set_up(SIZE, cluster_bits=12, log_capacity=64, **options)
    plane = Plane(bench.driver, bench.image, bench.file, bench.base, bench.data)
    bench.write(199 * CLUSTER, noise(CLUSTER))
    return bench, plane


def clear(bench: Bench, plane: Plane | None, model: bytearray, offset: int, nbytes: int, how: int) -> bool:
    served = clear_by(plane, bench, offset, nbytes, how)
    model[offset : offset + nbytes] = bytes(nbytes)
    return served


def change(bench: Bench, plane: Plane, model: bytearray, draw: random.Random) -> bool:
    """One change by either of them; whether the extent map made it."""
    by_plane = draw.random() < 0.7
    cluster = draw.randrange(199)
    if draw.random() < 0.2:
        how = draw.choice([DISCARD, UNMAP, KEEP])
        return clear(bench, plane if by_plane else None, model, cluster * CLUSTER, CLUSTER, how)
    offset = cluster * CLUSTER + draw.choice([0, 512, 1024])
    nbytes = min(draw.choice([512, 1024, CLUSTER]), CLUSTER - offset % CLUSTER)
    data = draw.randbytes(nbytes)
    served = write_by(plane if by_plane else None, bench, offset, data)
    model[offset : offset + nbytes] = data
    return served


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"encrypted": True}, 130),
        ({"encrypted": True, "base": noise(SIZE, seed=9)}, 130),
        ({"encrypted": True, "base": noise(99 * CLUSTER + 512, seed=9), "lazy": True}, 130),
        ({"data": b""}, 120),
        ({"data": UNTIDY}, 60),
        ({"data": UNTIDY, "base": noise(20 * CLUSTER, seed=9)}, 60),
    ],
    ids=["encrypted", "over a base", "over half a base", "in a data file", "in an untidy one", "in one, over a base"],
)
@pytest.mark.parametrize("seed", range(2))
def test_engine_and_extent_map_keep_one_disk(options: dict[str, Any], least: int, seed: int) -> None:
    bench, plane = started(seed=seed, **options)
    draw, served = random.Random(seed), 0
    model = bytearray((options.get("base") or b"").ljust(SIZE, b"\0")[:SIZE])
    model[199 * CLUSTER :] = noise(CLUSTER)
    for number in range(300):
        served += change(bench, plane, model, draw)
        if number % 20 == 0:
            assert bench.content() == model
            assert plane.read(0, CLUSTER) in (None, model[:CLUSTER])
        if number % 50 == 25:
            bench.driver.run(bench.image.flush())
    assert served > least
    assert bench.content() == model
    bench.close()
    assert bench.reopened_content() == model
    bench.assert_sound()


def test_a_place_of_an_encrypted_image_holds_what_decrypts_to_zeros() -> None:
    bench, plane = started(encrypted=True)
    place = plane.take(3 * CLUSTER + 512, 512)
    assert (place.old_nbytes, place.ahead, bool(place.memory)) == (512, 0, False)
    assert any(bench.file.read(place.host_offset - 512, 512))
    assert plane.write(3 * CLUSTER + 512, noise(512))
    assert bench.read(3 * CLUSTER, 1536) == bytes(512) + noise(512) + bytes(512)


def test_a_copy_into_an_encrypted_image_is_written_whole_and_waits() -> None:
    _, plane = started(encrypted=True, base=noise(SIZE, seed=9))
    place = plane.take(3 * CLUSTER + 512, 512)
    assert (place.old_nbytes, place.ahead, bool(place.memory)) == (CLUSTER, 512, True)


def test_new_tables_of_an_encrypted_image_are_zeros() -> None:
    bench = set_up(4 << 20, cluster_bits=10, encrypted=True)
    model = bytearray(4 << 20)
    for number in range(60):  # an L2 table maps 128 KiB
        offset = number * (64 << 10)
        bench.write(offset, noise(512, seed=number))
        model[offset : offset + 512] = noise(512, seed=number)
    bench.close()
    assert bench.reopened_content() == model
    bench.assert_sound()


def test_an_untouched_place_of_a_data_file_takes_the_bytes_alone() -> None:
    _, plane = started(data=UNTIDY)
    place = plane.take(50 * CLUSTER + 512, 512)
    assert (place.host_offset, place.old_nbytes, bool(place.memory)) == (50 * CLUSTER + 512, 0, False)
    assert plane.take(3 * CLUSTER, CLUSTER) is None, "what is there is no zeros"
    assert plane.take(150 * CLUSTER, CLUSTER) is None, "the end of the file lies in it"
    assert plane.take(151 * CLUSTER, CLUSTER) is not None, "past the end of the file"


def test_a_place_that_was_written_once_is_the_engines() -> None:
    bench, plane = started(data=b"")
    assert plane.write(3 * CLUSTER, noise(CLUSTER))
    clear(bench, None, bytearray(SIZE), 3 * CLUSTER, CLUSTER, DISCARD)
    assert plane.take(3 * CLUSTER, 512) is None, "the punch may have failed, or be lost"
    assert plane.take(4 * CLUSTER, 512) is not None


def test_zeros_of_a_data_file_are_entries_and_its_space_goes_with_a_punch() -> None:
    bench, plane = started(data=b"")
    assert plane.write(3 * CLUSTER, noise(CLUSTER))
    assert not plane.clear(3 * CLUSTER, CLUSTER, UNMAP)
    assert plane.clear(3 * CLUSTER, CLUSTER, KEEP)
    assert bench.read(3 * CLUSTER, CLUSTER) == bytes(CLUSTER)
    assert bench.data is not None
    assert bench.data.read(3 * CLUSTER, CLUSTER) == noise(CLUSTER)
    assert not plane.write(3 * CLUSTER, noise(512)), "in what is kept may be anything"


def test_what_went_with_its_table_is_not_untouched() -> None:
    """A cluster of zeros is data, and its place a hole; it is written in place, and then all tables go."""
    bench, _ = started(data=b"")
    bench.write(3 * CLUSTER, bytes(CLUSTER))
    bench.close()
    bench = open_again(bench, writable=True)
    bench.write(3 * CLUSTER, noise(CLUSTER))
    bench.driver.run(bench.image.empty())
    bench.write(3 * CLUSTER, noise(512))
    assert bench.read(3 * CLUSTER, CLUSTER) == noise(512) + bytes(CLUSTER - 512)


def test_what_was_discarded_is_not_untouched() -> None:
    bench, _ = started(data=b"")
    bench.write(3 * CLUSTER, bytes(CLUSTER))
    bench.close()
    bench = open_again(bench, writable=True)
    plane = Plane(bench.driver, bench.image, bench.file, None, bench.data)
    bench.write(3 * CLUSTER, noise(CLUSTER))
    assert plane.clear(3 * CLUSTER, CLUSTER, KEEP)
    bench.driver.run(bench.image.discard(3 * CLUSTER, CLUSTER))
    assert plane.take(3 * CLUSTER, 512) is None
