# SPDX-License-Identifier: GPL-2.0-or-later
"""What base.raw holds, known from a block's number alone."""
import hashlib

BLOCK = 4096
DATA_BLOCKS = 16384             # 64 MiB, no two blocks alike
HOLE_BLOCKS = 256               # then zeros, as a hole of the file
HOLE = DATA_BLOCKS              # the first of them
BLOCKS = DATA_BLOCKS + HOLE_BLOCKS


def block(number):
    """The content of a block of base.raw."""
    if number >= DATA_BLOCKS:
        return bytes(BLOCK)
    return hashlib.shake_128(b"lab base block %d" % number).digest(BLOCK)


def base(offset, length):
    """length bytes of base.raw at offset."""
    first = offset // BLOCK
    last = (offset + length - 1) // BLOCK
    data = b"".join(block(n) for n in range(first, last + 1))
    return data[offset - first * BLOCK:][:length]
