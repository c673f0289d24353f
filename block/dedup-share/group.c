/*
 * dedup-share: this process's membership in a group
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "map.h"
#include "reclaim.h"
#include "trace.h"

/* Both only change in the main loop. */
static QLIST_HEAD(, DedupGroup) groups = QLIST_HEAD_INITIALIZER(groups);
static const DedupStoreOps *store_ops[DEDUP_SHARE_STORE__MAX];

void dedup_store_register(const DedupStoreOps *ops)
{
    store_ops[ops->kind] = ops;
}

const DedupStoreOps *dedup_store_find(DedupShareStore kind)
{
    return store_ops[kind];
}


bool dedup_group_check(const DedupGroupConfig *config, Error **errp)
{
    uint64_t host = store_ops[config->store]->host_frames();

    if (!dedup_group_name_ok(config->name, errp)) {
        return false;
    }
    if (config->root[0] != '/') {
        error_setg(errp, "index-dir: '%s' is not an absolute path; name a "
                   "directory below /run", config->root);
        return false;
    }
    if (!config->has_size) {
        return true;
    }
    if (!config->size || config->size % DEDUP_BLOCK_SIZE) {
        error_setg(errp, "store-size: %" PRIu64 " is not a multiple of %d "
                   "greater than 0", config->size, DEDUP_BLOCK_SIZE);
        return false;
    }
    if (config->size / DEDUP_BLOCK_SIZE > MIN(host, DEDUP_MAX_FRAMES)) {
        error_setg(errp, "store-size: %" PRIu64 " is more than the host's %"
                   PRIu64 " bytes of memory; choose less, an eighth is the "
                   "default", config->size,
                   MIN(host, DEDUP_MAX_FRAMES) * DEDUP_BLOCK_SIZE);
        return false;
    }
    return true;
}

static void reap_store(const uint8_t uuid[16])
{
    int kind;

    for (kind = 0; kind < DEDUP_SHARE_STORE__MAX; kind++) {
        if (store_ops[kind]) {
            store_ops[kind]->reap(uuid);
        }
    }
}

/* --- damage ------------------------------------------------------------- */

static void (*on_damage)(void);

void dedup_group_on_damage(void (*fn)(void))
{
    on_damage = fn;
}

static void group_damaged(void *opaque)
{
    DedupGroup *g = opaque;

    if (on_damage && g->refcnt) {
        on_damage();
    }
}

/* --- joining and leaving ------------------------------------------------ */

/* The first of a group: make the store, then the index that leads to it. */
static bool group_create(DedupGroup *g, const DedupGroupConfig *config,
                         Error **errp)
{
    uint32_t nframes = config->has_size ? config->size / DEDUP_BLOCK_SIZE
                     : MIN(MAX(g->ops->host_frames() / 8, 1), DEDUP_MAX_FRAMES);
    DedupStoreId id = { .kind = config->store };

    memcpy(id.uuid, g->dir.uuid, sizeof(id.uuid));
    g->store = g->ops->open(g->name, g->dir.fd, nframes, true, &id, errp);
    if (!g->store) {
        return false;
    }
    if (!dedup_index_make(&g->index, g->dir.fd, g->dir.path, nframes,
                          g->ops->has_words, &id, errp)) {
        g->ops->close(g->store, true);
        return false;
    }
    return true;
}

/* The index is damaged: begin anew.  The group's directory is locked. */
static bool group_restart(DedupGroup *g, const DedupGroupConfig *config,
                          Error **errp)
{
    warn_report("dedup-share: the index of group '%s' was damaged: the store "
                "restarts empty", g->name);
    reap_store(g->dir.uuid);
    dedup_dir_empty(&g->dir);
    return group_create(g, config, errp);
}

static bool group_attach(DedupGroup *g, const DedupGroupConfig *config,
                         bool *create, Error **errp)
{
    DedupStoreId id;
    bool damaged;
    Error *err = NULL;

    if (!dedup_index_attach(&g->index, g->dir.fd, g->dir.path,
                            config->has_size ? config->size / DEDUP_BLOCK_SIZE
                                             : 0, &damaged, &err)) {
        if (damaged) {
            error_free(err);
            *create = true;
            return group_restart(g, config, errp);
        }
        error_propagate(errp, err);
        return false;
    }
    id = g->index.hdr->store;
    if (id.kind != config->store) {
        error_setg(errp, "store: the group '%s' has a store of another kind; "
                   "choose another group", g->name);
    } else {
        g->store = g->ops->open(g->name, g->dir.fd, g->index.nframes, false,
                                &id, errp);
    }
    if (!g->store) {
        dedup_index_unmap(&g->index);
    }
    return g->store;
}

static void close_all(DedupGroup *g, bool last)
{
    g->ops->close(g->store, last);
    dedup_index_unmap(&g->index);
}

/* Become one of the group's members. */
static bool group_enter(DedupGroup *g, bool create, Error **errp)
{
    DedupHolders *h = &g->holders;

    if (!dedup_holders_open(h, g->dir.fd, g->index.nframes, g->ops->each_used,
                            create, errp)) {
        close_all(g, create);
        return false;
    }
    if (!dedup_holders_take_row(h, dedup_bury, g, errp)) {
        dedup_holders_close(h);
        close_all(g, create);
        return false;
    }
    g->index.member = h->row + 1;
    return true;
}

/* Set up what there is but one of in a process. */
static void group_start(DedupGroup *g)
{
    g->damaged_bh = aio_bh_new(qemu_get_aio_context(), group_damaged, g);
    dedup_reclaim_start(g);
    QLIST_INSERT_HEAD(&groups, g, next);
}

static DedupGroup *group_join(const DedupGroupConfig *config, Error **errp)
{
    DedupGroup *g = g_new0(DedupGroup, 1);
    bool alone, create;

    g->ops = store_ops[config->store];
    g->refcnt = 1;
    g->name = g_strdup(config->name);
    g->root = g_strdup(config->root);
    if (!dedup_dir_join(&g->dir, g->root, g->name, reap_store, &alone,
                        errp)) {
        goto fail;
    }
    create = alone;
    if (!(alone ? group_create(g, config, errp)
                : group_attach(g, config, &create, errp)) ||
        !group_enter(g, create, errp)) {
        if (alone) {
            dedup_dir_remove(&g->dir);
        } else if (create) {
            dedup_dir_empty(&g->dir);   /* who comes next begins anew, too */
        }
        dedup_dir_close(&g->dir);
        goto fail;
    }
    dedup_map_sweep(g->dir.fd, g->dir.path);
    dedup_dir_joined(&g->dir);
    trace_dedup_index_open(g->dir.path, create, g->index.nframes);
    dedup_dir_sweep(g->root, g->name, reap_store);
    group_start(g);
    return g;

fail:
    g_free(g->name);
    g_free(g->root);
    g_free(g);
    return NULL;
}

DedupGroup *dedup_group_get(const DedupGroupConfig *config, Error **errp)
{
    DedupGroup *g;

    GLOBAL_STATE_CODE();
    QLIST_FOREACH(g, &groups, next) {
        if (strcmp(g->name, config->name) || strcmp(g->root, config->root) ||
            dedup_index_is_damaged(&g->index)) {
            continue;
        }
        if (config->has_size &&
            config->size / DEDUP_BLOCK_SIZE != g->index.nframes) {
            error_setg(errp, "store-size: another node of this QEMU opened "
                       "group '%s' with %" PRIu64 " bytes; say the same, or "
                       "leave store-size out", g->name,
                       (uint64_t)g->index.nframes * DEDUP_BLOCK_SIZE);
            return NULL;
        }
        g->refcnt++;
        return g;
    }
    return group_join(config, errp);
}

DedupGroup *dedup_group_find(const char *name)
{
    DedupGroup *g;

    QLIST_FOREACH(g, &groups, next) {
        if (!strcmp(g->name, name) && !dedup_index_is_damaged(&g->index)) {
            return g;
        }
    }
    return NULL;
}

static void group_free(DedupGroup *g, bool last)
{
    trace_dedup_index_close(g->dir.path, last);
    dedup_reclaim_stop(g);
    qemu_bh_delete(g->damaged_bh);
    dedup_holders_close(&g->holders);
    dedup_seen_close(&g->seen);
    close_all(g, last);
    if (last) {
        dedup_dir_remove(&g->dir);
    }
    dedup_dir_close(&g->dir);
    g_free(g->name);
    g_free(g->root);
    g_free(g);
}

void dedup_group_put(DedupGroup *g)
{
    GLOBAL_STATE_CODE();
    if (--g->refcnt) {
        return;
    }
    if (g->ops->any_used && g->ops->any_used(g->store)) {
        trace_dedup_group_stay(g->name);
        return;
    }
    QLIST_REMOVE(g, next);
    group_free(g, dedup_dir_leave(&g->dir));
}

void dedup_groups_leave(void)
{
    DedupGroup *g, *next;

    QLIST_FOREACH_SAFE(g, &groups, next, next) {
        if (!g->refcnt) {
            QLIST_REMOVE(g, next);
            group_free(g, dedup_dir_leave(&g->dir));
        }
    }
}
