/*
 * dedup-share: can this host's memory be shared?
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A guest page is given a frame by a private mapping of the store daemon's file
 * (given.h), or where that cannot be or is not worth it, by a copy (held.h).
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/madvise.h"
#include "probe.h"

/* What a guest's QEMU needs beside is asked by who registers the store. */
static bool linux_store_probe(Error **errp)
{
    void *page = mmap(NULL, DEDUP_BLOCK_SIZE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool ok = page != MAP_FAILED &&
              !madvise(page, DEDUP_BLOCK_SIZE, MADV_POPULATE_WRITE);

    if (page != MAP_FAILED) {
        munmap(page, DEDUP_BLOCK_SIZE);
    }
    if (qemu_real_host_page_size() != DEDUP_BLOCK_SIZE) {
        error_setg(errp, "store: the host's pages have %zu bytes, not %d; use "
                   "store=off", (size_t)qemu_real_host_page_size(),
                   DEDUP_BLOCK_SIZE);
    } else if (!ok) {
        error_setg(errp, "store: the Linux store needs Linux 5.14 or later; "
                   "use store=off");
    } else {
        return true;
    }
    return false;
}

const DedupStoreOps dedup_linux_store_ops = {
    .kind = DEDUP_SHARE_STORE_LINUX,
    .probe = linux_store_probe,
};
