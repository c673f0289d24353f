/*
 * qemu-dedup-store: how much memory it may take
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "memory-limit.h"

/* Of the host's memory, when less is available, or stalls take longer: */
#define SHORT_PERCENT 5
#define SHORT_PRESSURE 10.0     /* % of the last ten seconds */

/* The text of a file, or an empty one. */
static char *read_file(const char *root, const char *path)
{
    g_autofree char *full = g_strconcat(root, path, NULL);
    char *text = NULL;

    if (!g_file_get_contents(full, &text, NULL, NULL)) {
        return g_strdup("");
    }
    return text;
}

/* A number of bytes in a file of its own; UINT64_MAX if there is no limit. */
static uint64_t read_limit(const char *root, const char *dir, const char *name)
{
    g_autofree char *path = g_strconcat(dir, "/", name, NULL);
    g_autofree char *text = read_file(root, path);
    uint64_t value;

    /* version 2 says "max"; version 1 a number that is larger than any host */
    return !qemu_strtou64(g_strstrip(text), NULL, 10, &value)
           ? value : UINT64_MAX;
}

/* The tightest limit of the cgroup @group below @top, and of those above it. */
static uint64_t tree_limit(const char *root, const char *top,
                           const char *group, const char *name)
{
    g_autofree char *dir = g_strconcat(top, group, NULL);
    uint64_t limit = UINT64_MAX;

    while (g_str_has_prefix(dir, top) && strlen(dir) > strlen(top)) {
        limit = MIN(limit, read_limit(root, dir, name));
        *strrchr(dir, '/') = 0;
    }
    return MIN(limit, read_limit(root, top, name));
}

/* A line of /proc/self/cgroup: NUMBER:CONTROLLERS:GROUP. */
static uint64_t line_limit(const char *root, const char *line)
{
    g_auto(GStrv) part = g_strsplit(line, ":", 3);
    g_auto(GStrv) controllers = NULL;

    if (g_strv_length(part) != 3) {
        return UINT64_MAX;
    }
    controllers = g_strsplit(part[1], ",", 0);
    if (g_strv_contains((const char *const *)controllers, "memory")) {
        return tree_limit(root, "/sys/fs/cgroup/memory", part[2],
                          "memory.limit_in_bytes");
    }
    return part[1][0] ? UINT64_MAX :
           MIN(tree_limit(root, "/sys/fs/cgroup", part[2], "memory.max"),
               tree_limit(root, "/sys/fs/cgroup/unified", part[2],
                          "memory.max"));
}

/* A line of /proc/meminfo, in bytes; 0 if there is none. */
static uint64_t meminfo(const char *root, const char *name)
{
    g_autofree char *text = read_file(root, "/proc/meminfo");
    const char *line = strstr(text, name);
    unsigned long long kib;

    if (!line || sscanf(line + strlen(name), ": %llu kB", &kib) != 1) {
        return 0;
    }
    return kib * 1024;
}

uint64_t memory_limit_find(const char *root)
{
    uint64_t limit = meminfo(root, "MemTotal") ?: UINT64_MAX;
    g_autofree char *text = read_file(root, "/proc/self/cgroup");
    g_auto(GStrv) lines = g_strsplit(text, "\n", 0);
    unsigned i;

    for (i = 0; lines[i]; i++) {
        limit = MIN(limit, line_limit(root, lines[i]));
    }
    return limit;
}

bool memory_is_short(void)
{
    g_autofree char *text = read_file("", "/proc/pressure/memory");
    uint64_t total = meminfo("", "MemTotal");
    float some = 0;

    if (sscanf(text, "some avg10=%f", &some) == 1 && some > SHORT_PRESSURE) {
        return true;
    }
    return meminfo("", "MemAvailable") < total / 100 * SHORT_PERCENT;
}
