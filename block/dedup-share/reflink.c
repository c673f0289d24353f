/*
 * dedup-share: images that share physical blocks with others
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See reflink.h for when that is sound.
 */

#include "qemu/osdep.h"
#include "qemu/bitops.h"
#include "extents.h"
#include "layer.h"
#include "reflink.h"
#include "trace.h"

/* Blocks of the image that are blocks of another. */
typedef struct Range {
    uint64_t first, n;
    DedupMap *map;
    uint64_t to;                /* first is this one there */
} Range;

struct DedupAlias {
    GArray *ranges;             /* of Range, ascending, that do not overlap */
    GPtrArray *maps;            /* of DedupMap */
};

/* Images that are looked at, at most. */
#define MAX_SUPPLIERS 64

/* What goes into finding the ranges. */
typedef struct Finder {
    DedupMap *map;              /* the layer's */
    int dirfd;
    const DedupMapLayer *layer;
    const char *format;
    GArray *extents;            /* the layer's */
    DedupAlias *alias;
} Finder;

static void drop_map(gpointer map)
{
    dedup_map_close(map);
}

static DedupAlias *alias_new(void)
{
    DedupAlias *a = g_new(DedupAlias, 1);

    a->ranges = g_array_new(false, false, sizeof(Range));
    a->maps = g_ptr_array_new_with_free_func(drop_map);
    return a;
}

void dedup_alias_free(DedupAlias *a)
{
    if (a) {
        g_array_free(a->ranges, true);
        g_ptr_array_free(a->maps, true);
        g_free(a);
    }
}

/* The first range that ends behind @block, or the number of ranges. */
static unsigned find_range(const DedupAlias *a, uint64_t block)
{
    unsigned low = 0, high = a->ranges->len;

    while (low < high) {
        unsigned mid = (low + high) / 2;
        const Range *r = &g_array_index(a->ranges, Range, mid);

        if (r->first + r->n <= block) {
            low = mid + 1;
        } else {
            high = mid;
        }
    }
    return low;
}

void dedup_alias_lookup(const DedupAlias *a, DedupMap **map, uint64_t *number)
{
    unsigned i = find_range(a, *number);
    const Range *r;

    if (i < a->ranges->len) {
        r = &g_array_index(a->ranges, Range, i);
        if (r->first <= *number) {
            *map = r->map;
            *number = r->to + (*number - r->first);
        }
    }
}

/* --- adding ranges ------------------------------------------------------ */

/* Does @r go on where @last ends? */
static bool goes_on(const Range *last, const Range *r)
{
    return last->map == r->map && last->first + last->n == r->first &&
           last->to + last->n == r->to;
}

/* Add blocks of which none has a place yet. */
static void insert(DedupAlias *a, unsigned i, Range r)
{
    if (i && goes_on(&g_array_index(a->ranges, Range, i - 1), &r)) {
        g_array_index(a->ranges, Range, i - 1).n += r.n;
    } else {
        g_array_insert_val(a->ranges, i, r);
    }
}

/* Add blocks, as far as they have no place yet, and are not dirty there. */
static void add_range(DedupAlias *a, Range r)
{
    while (r.n) {
        unsigned i = find_range(a, r.first);
        const Range *next = i < a->ranges->len
                            ? &g_array_index(a->ranges, Range, i) : NULL;
        uint64_t step;

        if (next && next->first <= r.first) {
            step = MIN(r.n, next->first + next->n - r.first);
        } else {
            step = next ? MIN(r.n, next->first - r.first) : r.n;
            step = dedup_map_clean_run(r.map, r.to, step);
            if (step) {
                insert(a, i, (Range) { r.first, step, r.map, r.to });
            } else {
                step = 1;
            }
        }
        r.first += step;
        r.to += step;
        r.n -= step;
    }
}

/* Forget all that leads to @map. */
static void alias_forget(DedupAlias *a, DedupMap *map)
{
    unsigned i;

    for (i = a->ranges->len; i--; ) {
        if (g_array_index(a->ranges, Range, i).map == map) {
            g_array_remove_index(a->ranges, i);
        }
    }
}

/* Two extents share bytes of the disk: add the whole blocks among them. */
static void add_common(Finder *f, DedupMap *map, const DedupExtent *b,
                       const DedupExtent *a)
{
    uint64_t start = MAX(a->physical, b->physical);
    uint64_t end = MIN(a->physical + a->length, b->physical + b->length);
    uint64_t at_b = b->logical + (start - b->physical);
    uint64_t at_a = a->logical + (start - a->physical);
    uint64_t skip = ROUND_UP(at_b, DEDUP_BLOCK_SIZE) - at_b;

    if ((at_a + skip) % DEDUP_BLOCK_SIZE) {
        return;
    }
    at_b += skip;
    at_a += skip;
    start += skip;
    if (start < end) {
        add_range(f->alias, (Range) {
            .first = at_b / DEDUP_BLOCK_SIZE, .to = at_a / DEDUP_BLOCK_SIZE,
            .n = (end - start) / DEDUP_BLOCK_SIZE, .map = map,
        });
    }
}

static gint by_physical(gconstpointer a, gconstpointer b)
{
    const DedupExtent *x = a, *y = b;

    return (x->physical > y->physical) - (x->physical < y->physical);
}

/* The extents of @e that can be looked for, by their place on the disk. */
static GArray *sorted(const GArray *e)
{
    GArray *s = g_array_new(false, false, sizeof(DedupExtent));
    unsigned i;

    for (i = 0; i < e->len; i++) {
        DedupExtent x = g_array_index(e, DedupExtent, i);

        if (x.plain && x.shared) {
            g_array_append_val(s, x);
        }
    }
    g_array_sort(s, by_physical);
    return s;
}

/*
 * Add what the layer's extents and @extents, those of the image of @map, have
 * in common.  Extents of one file can have the disk's bytes in common, too.
 */
static void add_raw(Finder *f, DedupMap *map, const GArray *extents)
{
    g_autoptr(GArray) mine = sorted(f->extents);
    g_autoptr(GArray) theirs = sorted(extents);
    unsigned i, j, from = 0;

    for (i = 0; i < mine->len; i++) {
        const DedupExtent *b = &g_array_index(mine, DedupExtent, i);

        while (from < theirs->len &&
               g_array_index(theirs, DedupExtent, from).physical +
               g_array_index(theirs, DedupExtent, from).length <=
               b->physical) {
            from++;
        }
        for (j = from; j < theirs->len; j++) {
            const DedupExtent *a = &g_array_index(theirs, DedupExtent, j);

            if (a->physical >= b->physical + b->length) {
                break;
            }
            add_common(f, map, b, a);
        }
    }
}

static bool all_plain(const GArray *extents)
{
    unsigned i;

    for (i = 0; i < extents->len; i++) {
        const DedupExtent *e = &g_array_index(extents, DedupExtent, i);

        if (!e->plain || !e->shared) {
            return false;
        }
    }
    return extents->len;
}

/* The files are the same, so the images are. */
static void add_whole(Finder *f, DedupMap *map, const GArray *extents)
{
    Range all = { .n = f->layer->nblocks, .map = map };

    if (!f->alias->ranges->len && map->nblocks == all.n &&
        dedup_extents_equal(f->extents, extents) && all_plain(extents) &&
        dedup_map_clean_run(map, 0, all.n) == all.n) {
        insert(f->alias, 0, all);
    }
}

/* --- other images ------------------------------------------------------- */

/* No two maps are of the same age. */
static int compare_age(const DedupMapHeader *x, const DedupMapHeader *y)
{
    return x->made != y->made ? (x->made > y->made ? 1 : -1)
                              : strcmp(x->key, y->key);
}

/* The header of a map's file, if it may be that of a supplier. */
static bool read_header(Finder *f, const char *name, DedupMapHeader *hdr)
{
    int fd = openat(f->dirfd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    bool ok = fd >= 0 && pread(fd, hdr, sizeof(*hdr), 0) == sizeof(*hdr);

    if (fd >= 0) {
        close(fd);
    }
    return ok && dedup_map_header_ok(hdr) && hdr->path[0] &&
           hdr->dev == f->layer->dev && compare_age(hdr, f->map->file.base) < 0;
}

/* Has the image of @map not changed since, but for its dirty blocks? */
static bool is_unchanged(Finder *f, DedupMap *map, const DedupMapHeader *hdr)
{
    char key[DEDUP_LAYER_KEY_SIZE];
    const char *why;

    return dedup_map_has_writer(map) ||
           (dedup_layer_key_of_path(hdr->path, f->format, key, &why) ==
            DEDUP_KEY_SHARED && !strcmp(key, hdr->key));
}

static void add_supplier(Finder *f, const DedupMapHeader *hdr)
{
    DedupMapLayer layer = {
        .key = hdr->key, .path = hdr->path, .nblocks = hdr->nblocks,
        .dev = hdr->dev, .ino = hdr->ino,
    };
    unsigned before = f->alias->ranges->len;
    DedupMap *map = dedup_map_open(f->map->index, f->dirfd, &layer, NULL);
    GArray *extents;

    if (!map) {
        return;
    }
    g_ptr_array_add(f->alias->maps, map);
    extents = dedup_extents_get(hdr->path, hdr->dev, hdr->ino);
    if (extents) {
        if (!strcmp(f->format, "raw")) {
            add_raw(f, map, extents);
        } else {
            add_whole(f, map, extents);
        }
        g_array_free(extents, true);
    }
    if (f->alias->ranges->len != before && !is_unchanged(f, map, hdr)) {
        alias_forget(f->alias, map);
    }
}

static gint older_first(gconstpointer a, gconstpointer b)
{
    return compare_age(*(DedupMapHeader *const *)a,
                       *(DedupMapHeader *const *)b);
}

/*
 * Look at the images of the group with older maps, the oldest first: younger
 * ones may have blocks in older ones themselves, and all are to have them in
 * one.
 */
static void add_suppliers(Finder *f, const char *dir)
{
    g_autoptr(GDir) d = g_dir_open(dir, 0, NULL);
    g_autoptr(GPtrArray) all = g_ptr_array_new_with_free_func(g_free);
    const char *name;
    unsigned i;

    while (d && (name = g_dir_read_name(d))) {
        g_autofree DedupMapHeader *hdr = g_new0(DedupMapHeader, 1);

        if (g_str_has_prefix(name, "map-") &&
            !g_str_has_prefix(name, "map-new-") && read_header(f, name, hdr)) {
            g_ptr_array_add(all, g_steal_pointer(&hdr));
        }
    }
    g_ptr_array_sort(all, older_first);
    for (i = 0; i < MIN(all->len, MAX_SUPPLIERS); i++) {
        add_supplier(f, all->pdata[i]);
    }
}

static bool any_shared(const GArray *extents)
{
    unsigned i;

    for (i = 0; extents && i < extents->len; i++) {
        const DedupExtent *e = &g_array_index(extents, DedupExtent, i);

        if (e->plain && e->shared) {
            return true;
        }
    }
    return false;
}

/* Is the layer what it was when we began? */
static bool is_same_still(Finder *f)
{
    GArray *extents = dedup_extents_get(f->layer->path, f->layer->dev,
                                        f->layer->ino);
    char key[DEDUP_LAYER_KEY_SIZE];
    const char *why;
    /* to write out what others have changed may have unshared blocks */
    bool same = dedup_extents_same_places(f->extents, extents);

    if (extents) {
        g_array_free(extents, true);
    }
    return same && dedup_layer_key(f->layer->path, f->format, 1, key, &why) ==
                   DEDUP_KEY_SHARED && !strcmp(key, f->layer->key);
}

bool dedup_alias_possible(const DedupMapLayer *layer)
{
    GArray *extents = dedup_extents_get(layer->path, layer->dev, layer->ino);
    bool shared = any_shared(extents);

    if (extents) {
        g_array_free(extents, true);
    }
    return shared;
}

DedupAlias *dedup_alias_find(DedupMap *map, int dirfd, const char *dir,
                             const DedupMapLayer *layer, const char *format)
{
    Finder f = {
        .map = map, .dirfd = dirfd, .layer = layer, .format = format,
        .extents = dedup_extents_get(layer->path, layer->dev, layer->ino),
    };

    if (any_shared(f.extents)) {
        f.alias = alias_new();
        add_suppliers(&f, dir);
        trace_dedup_alias_find(layer->path, f.alias->maps->len,
                               f.alias->ranges->len);
        if (!f.alias->ranges->len || !is_same_still(&f)) {
            dedup_alias_free(f.alias);
            f.alias = NULL;
        }
    }
    if (f.extents) {
        g_array_free(f.extents, true);
    }
    return f.alias;
}
