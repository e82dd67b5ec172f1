"""Every command and flag of NBD against one export, with libnbd.

Run by tests/clients/run.sh: nbdsh -u URI -c 'exec(open("commands.py").read())' with CONTEXT in the
environment. The export is at least 16 MiB, writable, and may hold anything.
"""
import errno
import os

CONTEXT = os.environ["CONTEXT"]
URI = os.environ["URI"]
MIB = 1 << 20


def connect(structured=True, contexts=(), strict=True):
    """A connection of its own."""
    c = nbd.NBD()
    c.set_request_structured_replies(structured)
    for context in contexts:
        c.add_meta_context(context)
    if not strict:
        c.set_strict_mode(0)
    c.connect_uri(URI)
    return c


def refused(number, call, *args):
    """The call fails with that error."""
    try:
        call(*args)
    except nbd.Error as error:
        assert error.errnum == number, f"{error.errnum} is not {number}: {error}"
        return
    raise AssertionError(f"not refused with {number}")


def status(c, length, offset, context, flags=0):
    """Extents of one context."""
    found = {}

    def note(name, at, entries, error):
        found.setdefault(name, []).extend(zip(entries[::2], entries[1::2]))

    c.block_status(length, offset, note, flags)
    return found[context]


def abilities():
    c = connect()
    assert c.get_size() >= 16 * MIB
    assert c.can_flush() and c.can_fua() and c.can_trim() and c.can_zero()
    assert c.can_fast_zero() and c.can_cache() and c.can_df() and c.can_multi_conn()
    assert not c.is_read_only() and c.get_structured_replies_negotiated()
    assert c.get_block_size(nbd.SIZE_MINIMUM) == 1
    assert c.get_block_size(nbd.SIZE_PREFERRED) >= 4096
    assert c.get_block_size(nbd.SIZE_MAXIMUM) >= MIB
    c.shutdown()


def reads_and_writes():
    for structured in (True, False):
        c = connect(structured)
        for offset, length in ((0, 4096), (1, 1), (4095, 2), (5000, 70000), (MIB - 3, 4 * MIB)):
            data = os.urandom(length)
            c.pwrite(data, offset)
            assert c.pread(length, offset) == data
            data = os.urandom(length)
            c.pwrite(data, offset, nbd.CMD_FLAG_FUA)
            assert c.pread(length, offset) == data
        c.flush()
        c.shutdown()


def sparse_reads():
    c = connect()
    c.zero(4 * MIB, 0)
    c.pwrite(b"data" * 1024, MIB)
    holes, data = [], []

    def note(piece, offset, kind, error):
        (holes if kind == nbd.READ_HOLE else data).append((offset, len(piece)))

    whole = c.pread_structured(4 * MIB, 0, note)
    assert whole[MIB:MIB + 4096] == b"data" * 1024
    assert not any(whole[:MIB]) and not any(whole[MIB + 4096:])
    assert sum(length for _, length in holes) == 4 * MIB - 4096, holes
    assert data == [(MIB, 4096)], data
    chunks = []
    c.pread_structured(4 * MIB, 0, lambda *a: chunks.append(a[2]), nbd.CMD_FLAG_DF)
    assert chunks == [nbd.READ_DATA], chunks
    c.shutdown()


def zeroes_and_trims():
    c = connect(contexts=("base:allocation", CONTEXT))
    c.pwrite(b"\xff" * (4 * MIB), 0, nbd.CMD_FLAG_FUA)
    for at, flags in enumerate((
        0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO,
        nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA,
    )):
        offset = at * 65536 + 100
        c.zero(50000, offset, flags)
        assert not any(c.pread(50000, offset))
        assert c.pread(1, offset - 1) == b"\xff" and c.pread(1, offset + 50000) == b"\xff"
    c.trim(MIB, 2 * MIB)
    c.trim(MIB, 3 * MIB, nbd.CMD_FLAG_FUA)
    assert status(c, 2 * MIB, 2 * MIB, "base:allocation") == [(2 * MIB, 3)]
    c.zero(MIB, 2 * MIB, nbd.CMD_FLAG_NO_HOLE)
    assert status(c, 2 * MIB, 2 * MIB, "base:allocation") == [(MIB, 2), (MIB, 3)]
    one = status(c, 2 * MIB, 2 * MIB, "base:allocation", nbd.CMD_FLAG_REQ_ONE)
    assert one == [(MIB, 2)], one
    own = status(c, 2 * MIB, 2 * MIB, CONTEXT)
    assert sum(length for length, _ in own) == 2 * MIB and len(own) == 2, own
    assert own[0][1] != own[1][1]
    c.cache(MIB, 0)
    c.flush()
    c.shutdown()


def refusals():
    c = connect(contexts=("base:allocation",), strict=False)
    size = c.get_size()
    refused(errno.EINVAL, c.pread, 4096, size)
    refused(errno.EINVAL, c.pread, 2, size - 1)
    refused(errno.ENOSPC, c.pwrite, b"xx", size - 1)
    refused(errno.ENOSPC, c.zero, 4096, size)
    refused(errno.EINVAL, c.trim, 4096, size)
    refused(errno.EINVAL, c.cache, 4096, size)
    refused(errno.EINVAL, c.pread, 4096, 0, nbd.CMD_FLAG_FAST_ZERO)
    refused(errno.EINVAL, c.pwrite, b"x", 0, nbd.CMD_FLAG_DF)
    refused(errno.EINVAL, c.flush, 1 << 9)
    refused(errno.EINVAL, c.pread, c.get_block_size(nbd.SIZE_MAXIMUM) + 4096, 0)
    # The connection is as good as before.
    c.pwrite(b"still here", 0)
    assert c.pread(10, 0) == b"still here"
    c.shutdown()
    c = connect(strict=False)
    refused(errno.EINVAL, c.block_status, 4096, 0, lambda *a: 0)
    c.shutdown()


def many_at_once():
    connections = [connect() for _ in range(4)]
    blocks, cookies = {}, []
    for number, c in enumerate(connections):
        for at in range(32):
            offset = (at * 4 + number) * 8192
            data = os.urandom(8192)
            blocks[offset] = data
            buffer = nbd.Buffer.from_bytearray(bytearray(data))
            cookies.append((c, c.aio_pwrite(buffer, offset)))
    for c, cookie in cookies:
        while not c.aio_command_completed(cookie):
            c.poll(-1)
    # One flush covers what every connection was told: CAN_MULTI_CONN.
    connections[0].flush()
    for offset, data in blocks.items():
        assert connections[3].pread(8192, offset) == data
    for c in connections:
        c.shutdown()


def old_clients():
    c = nbd.NBD()
    c.set_handshake_flags(0)
    c.set_request_structured_replies(False)
    c.connect_uri(URI)
    c.pwrite(b"old", 0)
    assert c.pread(3, 0) == b"old"
    c.shutdown()


for check in (
    abilities, reads_and_writes, sparse_reads, zeroes_and_trims, refusals, many_at_once,
    old_clients,
):
    check()
    print(f"ok   commands.py {check.__name__}", flush=True)
