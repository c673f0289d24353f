/*
 * qemu-dedup-store: whose turn it is to read from a disk
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "turns.h"

struct Turns {
    unsigned most;
    GHashTable *devices;        /* Device, by its number */
};

typedef struct Device {
    uint64_t number;
    unsigned running;
    GQueue lanes;               /* Lane; the next one's turn is first */
} Device;

/* What one client waits for; never empty. */
typedef struct Lane {
    const void *who;
    GQueue jobs;
} Lane;

Turns *turns_new(unsigned most)
{
    Turns *t = g_new0(Turns, 1);

    t->most = most;
    t->devices = g_hash_table_new_full(g_int64_hash, g_int64_equal, NULL,
                                       g_free);
    return t;
}

void turns_free(Turns *t)
{
    g_hash_table_destroy(t->devices);
    g_free(t);
}

static Device *find_device(Turns *t, uint64_t number)
{
    Device *d = g_hash_table_lookup(t->devices, &number);

    if (!d) {
        d = g_new0(Device, 1);
        d->number = number;
        g_queue_init(&d->lanes);
        g_hash_table_insert(t->devices, &d->number, d);
    }
    return d;
}

static Lane *find_lane(Device *d, const void *who)
{
    Lane *lane;
    GList *l;

    for (l = d->lanes.head; l; l = l->next) {
        lane = l->data;
        if (lane->who == who) {
            return lane;
        }
    }
    lane = g_new0(Lane, 1);
    lane->who = who;
    g_queue_init(&lane->jobs);
    g_queue_push_tail(&d->lanes, lane);
    return lane;
}

bool turns_begin(Turns *t, dev_t device, const void *who, void *job)
{
    Device *d = find_device(t, device);

    if (d->running < t->most) {
        d->running++;
        return true;
    }
    g_queue_push_tail(&find_lane(d, who)->jobs, job);
    return false;
}

void *turns_end(Turns *t, dev_t device)
{
    Device *d = find_device(t, device);
    Lane *lane = g_queue_pop_head(&d->lanes);
    void *job;

    if (!lane) {
        if (!--d->running) {
            g_hash_table_remove(t->devices, &d->number);
        }
        return NULL;
    }
    job = g_queue_pop_head(&lane->jobs);
    if (g_queue_is_empty(&lane->jobs)) {
        g_free(lane);
    } else {
        g_queue_push_tail(&d->lanes, lane);
    }
    return job;
}
