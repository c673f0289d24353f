/*
 * dedup-share: the guest's memory, for the Linux store
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Says which of QEMU's memory may be mapped over, and when.  What else deals
 * with the identity of guest pages is of three kinds:
 *
 * - It only reads and writes them: dumps, migration, KVM, vhost in the kernel.
 *   A page that maps a frame behaves like any other for these.
 * - It discards them, by ram_block_discard_range(): balloons, free page
 *   reporting, virtio-mem, postcopy.  Hooks there have them made anonymous,
 *   before, and again after: a read may be given to them in between.
 * - It relies on pages that stay: VFIO and others that pin memory, RDMA, and
 *   postcopy and background snapshots, which watch it by userfaultfd.  These
 *   are what QEMU's balloon looks at, too (virtio_balloon_inhibited()), but
 *   RDMA: nothing is given while they do, and those that begin wait until what
 *   is being given is.
 */

#include "qemu/osdep.h"
#include "block/dedup-share-ram.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "exec/ramlist.h"
#include "hw/boards.h"
#include "hw/xen/xen.h"
#include "migration/misc.h"
#include "migration/options.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/madvise.h"
#include "qemu/module.h"
#include "qemu/rcu.h"
#include "system/hostmem.h"
#include "system/qtest.h"
#include "system/runstate.h"
#include "system/system.h"
#include "system/xen.h"
#include "given.h"
#include "probe.h"

/* Would new mappings lack what the user has asked for this memory? */
static bool is_special(const RAMBlock *rb)
{
    HostMemoryBackend *b = (HostMemoryBackend *)
        object_dynamic_cast(rb->mr->owner, TYPE_MEMORY_BACKEND);

    return b && (b->policy != HOST_MEM_POLICY_DEFAULT || b->prealloc ||
                 b->dump != machine_dump_guest_core(current_machine) ||
                 b->merge != machine_mem_merge(current_machine));
}

/* Private, anonymous, QEMU's own: see qemu_anon_ram_alloc(). */
static bool is_plain(const RAMBlock *rb)
{
    return rb && rb->mr && !is_special(rb) &&
           rb->fd < 0 && rb->guest_memfd < 0 &&
           rb->page_size == DEDUP_BLOCK_SIZE &&
           !(rb->flags & (RAM_SHARED | RAM_PREALLOC | RAM_PMEM |
                          RAM_READONLY | RAM_READONLY_FD | RAM_NORESERVE |
                          RAM_GUEST_MEMFD)) &&
           memory_region_is_ram(rb->mr) &&
           !memory_region_is_ram_device(rb->mr) &&
           !memory_region_is_rom(rb->mr);
}

static bool ram_find(void *host, DedupRam *ram)
{
    ram_addr_t offset;
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    rb = qemu_ram_block_from_host(host, false, &offset);
    if (!is_plain(rb)) {
        return false;
    }
    *ram = (DedupRam) { .host = rb->host, .size = rb->max_length };
    return true;
}

/*
 * A background snapshot, which watches memory, or a migration that pins it is
 * going out.  Kept here, as the state of a migration is freed when QEMU ends,
 * before the last reads do.
 */
static bool migration_frozen;   /* atomic */

static bool ram_may_give(void)
{
    return !ram_block_discard_is_disabled() &&
           !migration_in_incoming_postcopy() &&
           !qatomic_read(&migration_frozen) && !should_mlock(mlock_state);
}

/* As in ram_block_add(), but huge pages: a file's are not. */
static void ram_advise(void *host, size_t size, bool anonymous)
{
    if (!qtest_enabled()) {
        qemu_madvise(host, size, QEMU_MADV_DONTFORK);
    }
    if (!machine_dump_guest_core(current_machine)) {
        qemu_madvise(host, size, QEMU_MADV_DONTDUMP);
    }
    if (anonymous) {
        if (machine_mem_merge(current_machine)) {
            qemu_madvise(host, size, QEMU_MADV_MERGEABLE);
        }
        qemu_madvise(host, size, QEMU_MADV_HUGEPAGE);
    }
}

static const DedupRamOps ram_ops = {
    .find = ram_find,
    .may_give = ram_may_give,
    .advise = ram_advise,
};

static void ram_removed(RAMBlockNotifier *n, void *host, size_t size,
                        size_t max_size)
{
    dedup_given_forget(host);
}

static RAMBlockNotifier ram_notifier = {
    .ram_block_removed = ram_removed,
};

/* --- the hooks in system/physmem.c --------------------------------------- */

int dedup_share_ram_discard(RAMBlock *rb, uint64_t start, size_t length)
{
    return dedup_given_drop(rb->host + start, length);
}

void dedup_share_ram_pinned(void)
{
    dedup_given_wait();
}

/* --- migration ----------------------------------------------------------- */

static NotifierWithReturn migration_notifier;

static int migration_event(NotifierWithReturn *n, MigrationEvent *e,
                           Error **errp)
{
    bool setup = e->type == MIG_EVENT_PRECOPY_SETUP;

    qatomic_set(&migration_frozen,
                setup && (migration_in_bg_snapshot() || migrate_rdma()));
    if (setup) {
        dedup_given_wait();     /* all see it from now on */
    }
    return 0;
}

static bool applies(void)
{
    return !xen_domid || xen_mode == XEN_EMULATE;
}

static bool is_starting(void)
{
    return !phase_check(PHASE_MACHINE_READY);
}

static bool probe(Error **errp)
{
    if (!applies()) {
        error_setg(errp, "store: the memory of a Xen guest is not QEMU's; use "
                   "store=xen");
        return false;
    }
    return dedup_linux_store_ops.probe(errp);
}

static DedupStoreOps store_ops;

static void linux_store_register(void)
{
    store_ops = dedup_linux_store_ops;
    store_ops.applies = applies;
    store_ops.probe = probe;
    store_ops.is_starting = is_starting;
    dedup_given_set_ram(&ram_ops);
    dedup_store_register(&store_ops);
    ram_block_notifier_add(&ram_notifier);
    migration_add_notifier(&migration_notifier, migration_event);
}

type_init(linux_store_register);
