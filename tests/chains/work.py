"""Long work on the top of a random chain: what is done, and what the guest may see from then on."""

import random
from collections.abc import Awaitable, Callable

from qcow2.engine.image import Image
from qcow2.job.commit import commit
from qcow2.job.crew import Windows
from qcow2.job.pace import Pace
from qcow2.job.rebase import copy_difference
from qcow2.job.stream import name_of_base, stream
from qcow2.library.amend import Amendment, CannotAmend, amend_header, prepare, require_amendable
from qcow2.library.rebase import change_header
from tests.chains.chain import SECTOR, Chain, is_qcow2, opened

Work = Callable[[random.Random, Chain, bytes], Awaitable[bytes]]  # *before* -> what the guest sees after


async def _top(chain: Chain, draw: random.Random, *, writes_to: str | None = None) -> Image:
    top = await opened(chain.files, chain.names[0], writable=True, writes_to=writes_to, has_log=draw.random() < 0.5)
    assert isinstance(top, Image)
    return top


async def do_rebase(draw: random.Random, chain: Chain, before: bytes) -> bytes:
    name = draw.choice([None, "other", *chain.names[1:]])
    top = await _top(chain, draw)
    new = None if name is None else await opened(chain.files, name)
    is_compressed = draw.random() < 0.3
    await copy_difference(top, new, Pace(), Windows(3, 4096), is_compressed=is_compressed)
    await top.close()
    image_format = None if name is None else "qcow2" if is_qcow2(chain.files[name]) else "raw"
    await change_header(top.file, name, image_format)
    return before


async def do_commit(draw: random.Random, chain: Chain, before: bytes) -> bytes:
    depth = draw.randrange(1, len(chain.names))
    top = await _top(chain, draw, writes_to=chain.names[depth])
    base = top.chain[depth]
    await commit(top, base, Pace(), Windows(3, 4096))  # type: ignore[arg-type]
    await base.close()  # type: ignore[attr-defined]
    if depth == 1 and draw.random() < 0.7:
        await top.empty()
    await top.close()
    return before


async def do_stream(draw: random.Random, chain: Chain, before: bytes) -> bytes:
    top = await _top(chain, draw)
    base = draw.choice([None, *top.chain[1:]])
    await stream(top, base, Pace(), Windows(3, 4096))  # type: ignore[arg-type]
    await top.put_over(base, *name_of_base(top, base))  # type: ignore[arg-type]
    await top.close()
    return before


async def do_resize(draw: random.Random, chain: Chain, before: bytes) -> bytes:
    top = await _top(chain, draw)
    size = draw.randrange(1, 2 * top.size // SECTOR) * SECTOR
    await (top.grow(size) if size > top.size else top.shrink(size))
    await top.close()
    return before[:size].ljust(size, b"\0")


async def do_amend(draw: random.Random, chain: Chain, before: bytes) -> bytes:
    wanted = Amendment(
        version=draw.choice((None, 2, 3)),
        lazy_refcounts=draw.choice((None, True, False)),
        refcount_order=draw.choice((None, None, 2, 4, 5)),
    )
    top = await _top(chain, draw)
    try:
        await require_amendable(top, wanted, Pace())
    except CannotAmend:
        await top.close()
        return before
    await prepare(top, wanted, Pace())
    await top.close()
    await amend_header(top.file, wanted, Pace())
    return before


WORK: dict[str, Work] = {
    "rebase": do_rebase,
    "commit": do_commit,
    "stream": do_stream,
    "resize": do_resize,
    "amend": do_amend,
}
