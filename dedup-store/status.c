/*
 * qemu-dedup-store: what it has, and for whom
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/sysmacros.h>
#include "qapi/error.h"
#include "qapi/qapi-visit-dedup-share.h"
#include "qapi/qobject-output-visitor.h"
#include "qobject/qjson.h"
#include "qobject/qobject.h"
#include "server.h"

static void add_layer(void *opaque, Layer *layer)
{
    DedupStoreStatus *s = opaque;
    DedupStoreLayer *l;

    if (!layer_is_leased(layer)) {
        return;
    }
    l = g_new0(DedupStoreLayer, 1);
    l->device = g_strdup_printf("%u:%u", major(layer->dev), minor(layer->dev));
    l->inode = layer->ino;
    l->blocks = layer->nblocks;
    l->known = layer->known;
    l->clients = layer->clients;
    QAPI_LIST_PREPEND(s->layers, l);
}

static void add_client_layers(DedupStoreClient *out, const Client *c)
{
    unsigned i;

    for (i = DEDUP_LIMIT_LAYERS; i--; ) {
        const ClientLayer *cl = &c->layers[i];
        DedupStoreClientLayer *l;

        if (!cl->used || cl->opening) {
            continue;
        }
        l = g_new0(DedupStoreClientLayer, 1);
        l->layer = i;
        l->leased = cl->state == DEDUP_LAYER_LEASED;
        l->reason = g_strdup(cl->text);
        QAPI_LIST_PREPEND(out->layers, l);
    }
}

/* A process that holds frames, or may: with its connection, if it has one. */
static void add_process(DedupStoreStatus *s, const Process *p)
{
    DedupStoreClient *out;
    const Client *c;

    QTAILQ_FOREACH(c, &server.clients, next) {
        if (c->process == p) {
            break;
        }
    }
    if ((!c && !g_hash_table_size(p->held)) || (c && !c->greeted) ||
        (c && c->observer)) {
        return;
    }
    out = g_new0(DedupStoreClient, 1);
    out->pid = p->pid;
    out->connected = c;
    out->holds = g_hash_table_size(p->held);
    if (c) {
        out->requests = c->nrequests;
        add_client_layers(out, c);
    }
    QAPI_LIST_PREPEND(s->clients, out);
}

char *status_json(void)
{
    Store *store = server.store;
    DedupStoreStatus *s = g_new0(DedupStoreStatus, 1);
    g_autoptr(GString) text = NULL;
    Process *p;
    QObject *object;
    Visitor *v = qobject_output_visitor_new(&object);

    s->group = g_strdup(server.group);
    s->size = store->size;
    s->memory = frames_memory(&store->frames) +
                frames_old_memory(&store->frames);
    s->frames_used = store->nsealed - store->nidle;
    s->frames_idle = store->nidle;
    s->saved = store->saved * BLOCK;
    s->blocks_filled = store->fills;
    s->blocks_put = store->puts;
    s->blocks_matched = store->matched;
    s->frames_evicted = store->evicted;
    layers_each(server.layers, add_layer, s);
    QTAILQ_FOREACH(p, &store->processes, next) {
        add_process(s, p);
    }
    visit_type_DedupStoreStatus(v, NULL, &s, &error_abort);
    visit_complete(v, &object);
    text = qobject_to_json(object);
    qapi_free_DedupStoreStatus(s);
    visit_free(v);
    qobject_unref(object);
    return g_string_free(g_steal_pointer(&text), false);
}
