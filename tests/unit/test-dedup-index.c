/*
 * dedup-share: tests of the index, its directory, and layer keys
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "block/dedup-share/index-dir.h"
#include "block/dedup-share/layer.h"
#include "block/dedup-share/map.h"
#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <glib/gstdio.h>

static char *root;              /* an index-dir of our own, on a tmpfs */
static const DedupStoreId test_store = { .kind = 1, .domid = 77 };

static char *sub(const char *name)
{
    return g_build_filename(root, name, NULL);
}

static void remove_tree(const char *path)
{
    g_autoptr(GDir) d = g_dir_open(path, 0, NULL);
    const char *name;

    while (d && (name = g_dir_read_name(d))) {
        g_autofree char *p = g_build_filename(path, name, NULL);

        if (g_file_test(p, G_FILE_TEST_IS_DIR)) {
            remove_tree(p);
        } else {
            g_unlink(p);
        }
    }
    g_rmdir(path);
}

static void make_root(void)
{
    root = g_strdup("/dev/shm/test-dedup-XXXXXX");
    g_assert_nonnull(g_mkdtemp(root));
}

static void drop_root(void)
{
    remove_tree(root);
    g_free(root);
}

/* An index of @nframes in a directory of its own. */
typedef struct Fixture {
    int dirfd;
    DedupIndex index;
} Fixture;

static void setup(Fixture *f, uint32_t nframes)
{
    make_root();
    f->dirfd = open(root, O_RDONLY | O_DIRECTORY);
    g_assert_cmpint(f->dirfd, >=, 0);
    dedup_index_make(&f->index, f->dirfd, root, nframes, true, &test_store,
                     &error_abort);
    f->index.member = 1;
}

static void teardown(Fixture *f)
{
    dedup_index_unmap(&f->index);
    close(f->dirfd);
    drop_root();
}

static DedupFrameId seal(DedupIndex *index, uint32_t slot, uint64_t word)
{
    DedupDigest digest = { .low = word * 0x9e3779b97f4a7c15, .high = word };

    return dedup_index_seal(index, slot, word, &digest);
}

/* As who has begun to evict a frame, and found it idle. */
static void evict(DedupIndex *index, uint32_t slot)
{
    g_assert_true(dedup_index_evict_begin(index, slot));
    dedup_index_evict_commit(index, slot);
    dedup_index_release(index, slot);
}

static DedupMap *open_map(DedupIndex *index, int dirfd, const char *key,
                          uint64_t nblocks, Error **errp)
{
    DedupMapLayer layer = { .key = key, .nblocks = nblocks };

    return dedup_map_open(index, dirfd, &layer, errp);
}

static void test_frame_life(void)
{
    Fixture f;
    uint32_t slots[4];
    uint64_t word;
    DedupFrameId id, again;

    setup(&f, 2);
    g_assert_cmpint(dedup_index_alloc(&f.index, slots, 4), ==, 2);
    g_assert_cmpint(slots[0], !=, slots[1]);

    id = (DedupFrameId) { .slot = slots[0], .generation = 1 };
    g_assert_false(dedup_index_get(&f.index, id, &word));   /* filling */
    id = seal(&f.index, slots[0], 0x1234);
    g_assert_true(dedup_index_get(&f.index, id, &word));
    g_assert_cmphex(word, ==, 0x1234);
    g_assert_cmpint(f.index.hdr->nsealed, ==, 1);

    /* an id is never good again once its slot was released */
    evict(&f.index, slots[0]);
    g_assert_false(dedup_index_get(&f.index, id, &word));
    g_assert_cmpint(f.index.hdr->nsealed, ==, 0);
    g_assert_cmpint(dedup_index_alloc(&f.index, slots, 4), ==, 1);
    again = seal(&f.index, slots[0], 0x5678);
    g_assert_cmpint(again.slot, ==, id.slot);
    g_assert_cmpint(again.generation, !=, id.generation);
    g_assert_false(dedup_index_get(&f.index, id, &word));
    g_assert_true(dedup_index_get(&f.index, again, &word));
    g_assert_cmphex(word, ==, 0x5678);
    teardown(&f);
}

static void test_frame_wild_ids(void)
{
    Fixture f;
    uint64_t word;
    uint32_t i, slot;

    setup(&f, 3);
    g_assert_cmpint(dedup_index_alloc(&f.index, &slot, 1), ==, 1);
    seal(&f.index, slot, 1);
    for (i = 0; i < 64; i++) {
        DedupFrameId id = { .slot = i < 32 ? 1u << i : slot,
                            .generation = i < 32 ? 1 : i - 32 };
        bool real = id.slot == slot && id.generation == 1;

        g_assert_cmpint(dedup_index_get(&f.index, id, &word), ==, real);
    }
    teardown(&f);
}

/* When the generations of a slot are used up it is never used again. */
static void test_generation_wrap(void)
{
    Fixture f;
    uint32_t slot;
    unsigned i;

    setup(&f, 1);
    g_assert_cmpint(dedup_index_alloc(&f.index, &slot, 1), ==, 1);
    for (i = 1; i < DEDUP_GENERATION_MAX; i++) {
        g_assert_cmpint(dedup_index_name(&f.index, slot).generation, ==, i);
        dedup_index_release(&f.index, slot);
        g_assert_cmpint(dedup_index_alloc(&f.index, &slot, 1), ==, 1);
    }
    dedup_index_release(&f.index, slot);
    g_assert_cmpint(dedup_index_alloc(&f.index, &slot, 1), ==, 0);
    g_assert_cmpint(dedup_index_state(&f.index, slot, &i), ==,
                    DEDUP_FRAME_RETIRED);
    g_assert_false(dedup_index_is_damaged(&f.index));
    teardown(&f);
}

/* Several processes take and return slots: none is ever held by two. */
static void hammer(DedupIndex *index, uint32_t *owner, uint32_t me)
{
    uint32_t slots[8];
    int round;
    unsigned i, n;

    index->member = me;
    for (round = 0; round < 20000; round++) {
        n = dedup_index_alloc(index, slots, 1 + round % 8);
        for (i = 0; i < n; i++) {
            if (qatomic_xchg(&owner[slots[i]], me)) {
                _exit(1);
            }
        }
        for (i = 0; i < n; i++) {
            if (round % 2) {
                seal(index, slots[i], me);
            }
            if (qatomic_xchg(&owner[slots[i]], 0) != me) {
                _exit(2);
            }
            if (round % 2) {
                evict(index, slots[i]);
            } else {
                dedup_index_release(index, slots[i]);
            }
        }
    }
    _exit(0);
}

static void test_frame_processes(void)
{
    const unsigned nframes = 16;
    Fixture f;
    uint32_t *owner, slots[16];
    int i, status;

    setup(&f, nframes);
    owner = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (i = 1; i <= 4; i++) {
        if (!fork()) {
            hammer(&f.index, owner, i);
        }
    }
    for (i = 1; i <= 4; i++) {
        g_assert_cmpint(wait(&status), >, 0);
        g_assert_cmpint(status, ==, 0);
    }
    /* nothing leaked */
    g_assert_cmpint(dedup_index_alloc(&f.index, slots, nframes), ==, nframes);
    g_assert_cmpint(f.index.hdr->nsealed, ==, 0);
    munmap(owner, 4096);
    teardown(&f);
}

static const DedupFrameId none;

static void assert_entry(DedupMap *map, uint64_t block, DedupFrameId id)
{
    DedupFrameId got = dedup_map_lookup(map, block);

    g_assert_cmpint(got.generation, ==, id.generation);
    if (id.generation) {
        g_assert_cmpint(got.slot, ==, id.slot);
    }
}

static void test_map(void)
{
    Fixture f;
    DedupFrameId a = { 0, 1 }, b = { 5, 9 };
    DedupMap *map, *other, *another;

    setup(&f, 1);
    map = open_map(&f.index, f.dirfd, "k1", 5000, &error_abort);
    other = open_map(&f.index, f.dirfd, "k1", 5000, &error_abort);
    another = open_map(&f.index, f.dirfd, "k2", 5000, &error_abort);

    assert_entry(map, 7, none);
    g_assert_true(dedup_map_record(map, 7, none, a));
    assert_entry(other, 7, a);                  /* slot 0 is not "none" */
    assert_entry(another, 7, none);
    g_assert_false(dedup_map_record(other, 7, none, b));
    assert_entry(map, 7, a);
    g_assert_true(dedup_map_record(other, 7, a, b));
    assert_entry(map, 7, b);

    /* out of bounds: a miss, and nothing recorded */
    assert_entry(map, 5000, none);
    g_assert_false(dedup_map_record(map, 5000, none, a));
    g_assert_false(dedup_map_record(map, UINT64_MAX, none, a));
    dedup_map_close(map);
    dedup_map_close(other);
    dedup_map_close(another);
    teardown(&f);
}

static void test_map_damaged(void)
{
    Fixture f;
    const DedupFrameId a = { 0, 1 };
    DedupMap *map;
    g_autofree char *path = NULL;

    setup(&f, 1);
    map = open_map(&f.index, f.dirfd, "k", 100, &error_abort);
    dedup_map_record(map, 7, none, a);
    assert_entry(map, 7, a);
    ((DedupMapHeader *)map->file.base)->nblocks++;
    dedup_map_close(map);
    map = open_map(&f.index, f.dirfd, "k", 100, &error_abort);
    assert_entry(map, 7, none);                 /* another map in its place */
    dedup_map_record(map, 7, none, a);
    dedup_map_close(map);
    path = sub("map-k");
    g_assert_cmpint(truncate(path, 10), ==, 0);
    map = open_map(&f.index, f.dirfd, "k", 100, &error_abort);
    assert_entry(map, 7, none);
    dedup_map_close(map);
    teardown(&f);
}

/* A full tmpfs: what has no memory is not touched, and works later. */

static int fill_up(const char *path)
{
    static const char zeroes[4096];
    int fd = open(path, O_WRONLY | O_CREAT, 0600);

    while (write(fd, zeroes, sizeof(zeroes)) == sizeof(zeroes)) {
        /* until it is full */
    }
    return close(fd);
}

/* Exits with 77 if it cannot mount. */
static void in_small_tmpfs(void)
{
    const DedupFrameId none = { 0 }, id = { .slot = 1, .generation = 1 };
    const uint64_t far = 500000;
    g_autofree char *filler = sub("filler");
    Error *err = NULL;
    static DedupIndexHeader hdr;
    DedupIndex index, no_index = { .hdr = &hdr };
    DedupMap *map;
    int dirfd;

    if (unshare(CLONE_NEWNS) < 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0) {
        _exit(77);
    }
    if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("tmpfs", root, "tmpfs", 0, "size=512k") < 0) {
        _exit(77);
    }
    dirfd = open(root, O_RDONLY | O_DIRECTORY);
    map = open_map(&no_index, dirfd, "k", 1000000, &error_abort);
    g_assert_true(dedup_map_back(map, 0));
    fill_up(filler);
    g_assert_true(dedup_map_back(map, 0));
    g_assert_false(dedup_map_back(map, far));
    g_assert_null(open_map(&no_index, dirfd, "l", 1000000, &err));
    error_free_or_abort(&err);
    g_assert_false(dedup_index_make(&index, dirfd, root, 100000, true,
                                    &test_store, &err));
    g_assert_nonnull(strstr(error_get_pretty(err), "store-size"));
    error_free_or_abort(&err);
    g_assert_cmpint(faccessat(dirfd, "index.new", F_OK, 0), ==, -1);

    unlink(filler);
    g_assert_true(dedup_map_back(map, far));
    g_assert_true(dedup_map_record(map, far, none, id));
    g_assert_cmpint(dedup_map_lookup(map, far).slot, ==, 1);
    dedup_map_close(map);
    _exit(0);
}

static void test_tmpfs_full(void)
{
    int status;
    pid_t pid;

    make_root();
    pid = fork();
    if (!pid) {
        in_small_tmpfs();
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    drop_root();
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
        g_test_skip("cannot mount a tmpfs");
    } else {
        g_assert_cmpint(status, ==, 0);
    }
}

/* Joining a group: who is alone, and what is reclaimed */

static unsigned reaped;
static uint8_t reaped_uuid[16];

static void count_reap(const uint8_t uuid[16])
{
    memcpy(reaped_uuid, uuid, sizeof(reaped_uuid));
    reaped++;
}

static bool join(DedupDir *dir, const char *group, bool *alone, Error **errp)
{
    return dedup_dir_join(dir, root, group, count_reap, alone, errp);
}

/* Join and make what the first of a group makes. */
static void join_first(DedupDir *dir, DedupIndex *index)
{
    bool alone;

    g_assert_true(join(dir, "g", &alone, &error_abort));
    g_assert_true(alone);
    g_assert_cmpmem(reaped_uuid, 16, dir->uuid, 16);
    dedup_index_make(index, dir->fd, dir->path, 4, false, &test_store,
                     &error_abort);
    dedup_dir_joined(dir);
}

static void test_dir_first_and_last(void)
{
    DedupDir a, b;
    DedupIndex index;
    bool alone;
    g_autofree char *path = NULL;

    make_root();
    reaped = 0;
    join_first(&a, &index);
    g_assert_true(join(&b, "g", &alone, &error_abort));
    g_assert_false(alone);
    dedup_dir_joined(&b);

    g_assert_false(dedup_dir_leave(&a));
    dedup_dir_close(&a);
    g_assert_true(dedup_dir_leave(&b));
    dedup_dir_remove(&b);
    dedup_dir_close(&b);
    path = sub("g");
    g_assert_false(g_file_test(path, G_FILE_TEST_EXISTS));
    g_assert_cmpint(reaped, ==, 1);     /* what a might have found */
    dedup_index_unmap(&index);
    drop_root();
}

/* A process in group "g" that is killed. */
static void killed_member(void)
{
    DedupDir dir;
    DedupIndex index;
    int status;
    pid_t pid = fork();

    if (!pid) {
        join_first(&dir, &index);
        open_map(&index, dir.fd, "k", 10, &error_abort);
        kill(getpid(), SIGKILL);
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_true(WIFSIGNALED(status));
}

/* A process that is killed before it has made an index. */
static void killed_early(void)
{
    DedupDir dir;
    int status;
    bool alone;
    pid_t pid = fork();

    if (!pid) {
        join(&dir, "g", &alone, &error_abort);
        kill(getpid(), SIGKILL);
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_true(WIFSIGNALED(status));
}

/* Its store is found by the UUID that it was made with. */
static void test_dir_killed_early(void)
{
    DedupDir a, b;
    bool alone;

    make_root();
    g_assert_true(join(&a, "g", &alone, &error_abort));
    dedup_dir_leave(&a);
    dedup_dir_close(&a);                /* the directory stays */
    killed_early();
    reaped = 0;
    g_assert_true(join(&b, "g", &alone, &error_abort));
    g_assert_true(alone);
    g_assert_cmpint(reaped, ==, 1);
    g_assert_cmpmem(reaped_uuid, 16, a.uuid, 16);
    dedup_dir_leave(&b);
    dedup_dir_close(&b);

    dedup_dir_sweep(root, "other", count_reap);
    g_assert_cmpint(reaped, ==, 2);
    g_assert_cmpmem(reaped_uuid, 16, a.uuid, 16);
    g_assert_true(join(&b, "other", &alone, &error_abort));
    g_assert_cmpint(memcmp(b.uuid, a.uuid, 16), !=, 0);
    dedup_dir_leave(&b);
    dedup_dir_close(&b);
    drop_root();
}

static void test_dir_killed(void)
{
    DedupDir dir;
    bool alone;
    g_autofree char *index = NULL;
    g_autofree char *map = NULL;

    make_root();
    reaped = 0;
    killed_member();
    index = sub("g/index");
    map = sub("g/map-k");
    g_assert_true(g_file_test(index, G_FILE_TEST_EXISTS));
    g_assert_true(g_file_test(map, G_FILE_TEST_EXISTS));
    g_assert_true(join(&dir, "g", &alone, &error_abort));
    g_assert_true(alone);
    g_assert_cmpint(reaped, ==, 1);
    g_assert_false(g_file_test(index, G_FILE_TEST_EXISTS));
    g_assert_false(g_file_test(map, G_FILE_TEST_EXISTS));
    dedup_dir_remove(&dir);
    dedup_dir_close(&dir);
    drop_root();
}

/* Whoever joins another group removes what was left of this one. */
static void test_dir_sweep(void)
{
    DedupDir used;
    DedupIndex index;
    bool alone;
    g_autofree char *path = NULL;

    make_root();
    reaped = 0;
    killed_member();
    path = sub("g");
    dedup_dir_sweep(root, "other", count_reap);
    g_assert_cmpint(reaped, ==, 1);
    g_assert_false(g_file_test(path, G_FILE_TEST_EXISTS));

    join_first(&used, &index);
    dedup_dir_sweep(root, "other", count_reap);
    g_assert_cmpint(reaped, ==, 2);             /* in use: left alone */
    g_assert_true(g_file_test(path, G_FILE_TEST_EXISTS));
    g_assert_true(dedup_dir_leave(&used));
    dedup_dir_close(&used);
    dedup_index_unmap(&index);
    g_assert_true(join(&used, "g", &alone, &error_abort));
    dedup_dir_close(&used);
    drop_root();
}

static void expect_join_error(const char *group, const char *text)
{
    DedupDir dir;
    Error *err = NULL;
    bool alone;

    g_assert_false(join(&dir, group, &alone, &err));
    g_assert_nonnull(strstr(error_get_pretty(err), text));
    error_free(err);
}

/* Nobody is in the group: what is there is removed. */
static void expect_join(const char *group)
{
    g_autofree char *index = g_build_filename(root, group, "index", NULL);
    DedupDir dir;
    bool alone;

    g_assert_true(join(&dir, group, &alone, &error_abort));
    g_assert_true(alone);
    g_assert_false(g_file_test(index, G_FILE_TEST_EXISTS));
    dedup_dir_leave(&dir);
    dedup_dir_close(&dir);
}

static void test_dir_refused(void)
{
    g_autofree char *g = NULL;
    g_autofree char *file = NULL;
    g_autofree char *index = NULL;
    g_autofree char *lock = NULL;
    DedupIndexHeader hdr;

    make_root();
    g = sub("g");
    file = sub("g/letter.txt");
    index = sub("g/index");
    lock = sub("g/lock");

    g_assert_cmpint(g_mkdir(g, 0755), ==, 0);
    expect_join_error("g", "mode 0755");
    g_assert_cmpint(g_chmod(g, 0700), ==, 0);

    if (geteuid() == 0) {
        g_assert_cmpint(chown(g, 1234, -1), ==, 0);
        expect_join_error("g", "belongs to user 1234");
        g_assert_cmpint(chown(g, 0, -1), ==, 0);
    }

    g_assert_true(g_file_set_contents(file, "hello", -1, NULL));
    expect_join_error("g", "letter.txt");
    g_assert_true(g_file_test(file, G_FILE_TEST_EXISTS));
    g_unlink(file);

    /* what is damaged is dropped */
    g_assert_true(g_file_set_contents(index, "hello", -1, NULL));
    expect_join("g");
    memset(&hdr, 0, sizeof(hdr));
    g_assert_true(g_file_set_contents(index, (char *)&hdr, sizeof(hdr), NULL));
    g_assert_cmpint(truncate(index, 8192), ==, 0);
    expect_join("g");
    hdr.magic = DEDUP_INDEX_MAGIC;
    hdr.version = DEDUP_INDEX_VERSION;
    g_assert_true(g_file_set_contents(index, (char *)&hdr, sizeof(hdr), NULL));
    g_assert_cmpint(truncate(index, 8192), ==, 0);
    expect_join("g");
    /* what another version has made is not */
    hdr.version = 4 | (0xffff & ~4) << 16;
    g_assert_true(g_file_set_contents(index, (char *)&hdr, sizeof(hdr), NULL));
    g_assert_cmpint(truncate(index, 8192), ==, 0);
    expect_join_error("g", "another version");
    g_assert_true(g_file_test(index, G_FILE_TEST_EXISTS));
    g_unlink(index);

    g_unlink(lock);
    g_rmdir(g);
    g_assert_true(g_file_set_contents(g, "a file", -1, NULL));
    expect_join_error("g", "not a directory");
    g_unlink(g);
    drop_root();
}

/* An index that is not what it should be is found to be damaged. */
static void test_index_truncated(void)
{
    DedupDir dir;
    DedupIndex index, other;
    bool damaged;
    Error *err = NULL;
    g_autofree char *path = NULL;

    make_root();
    join_first(&dir, &index);
    path = sub("g/index");
    g_assert_false(dedup_index_attach(&other, dir.fd, "here", 5, &damaged,
                                      &err));
    g_assert_nonnull(strstr(error_get_pretty(err), "store-size"));
    g_assert_false(damaged);
    error_free_or_abort(&err);
    g_assert_true(dedup_index_attach(&other, dir.fd, "here", 4, &damaged,
                                     &error_abort));
    /* whoever finds it damaged tells all */
    dedup_index_set_damaged(&other);
    g_assert_true(dedup_index_is_damaged(&index));
    dedup_index_unmap(&other);
    g_assert_false(dedup_index_attach(&other, dir.fd, "here", 0, &damaged,
                                      &err));
    g_assert_true(damaged);
    error_free_or_abort(&err);
    dedup_index_unmap(&index);
    g_assert_cmpint(truncate(path, DEDUP_HEADER_SIZE), ==, 0);
    g_assert_false(dedup_index_attach(&other, dir.fd, "here", 0, &damaged,
                                      &err));
    g_assert_true(damaged);
    error_free_or_abort(&err);
    dedup_dir_close(&dir);
    drop_root();
}

static void test_not_tmpfs(void)
{
    Error *err = NULL;
    bool made;

    /* /proc is never a tmpfs, and belongs to root with mode 0555 */
    g_assert_false(dedup_dir_prepare("/proc", &made, &err));
    error_free_or_abort(&err);
    g_assert_false(dedup_dir_prepare("/dev/shm/no/such/place", &made, &err));
    error_free_or_abort(&err);
}

static void test_group_names(void)
{
    static const char *good[] = { "a", "default", "vdi-7", "A.b_c",
                                  "0123456789abcdef0123456789abcdef" };
    static const char *bad[] = { "", ".", "..", ".xen", "-x", "a/b", "a b",
                                 "0123456789abcdef0123456789abcdef0",
                                 "ä", "a\n" };
    int i;

    for (i = 0; i < ARRAY_SIZE(good); i++) {
        g_assert_true(dedup_group_name_ok(good[i], NULL));
    }
    for (i = 0; i < ARRAY_SIZE(bad); i++) {
        Error *err = NULL;

        g_assert_false(dedup_group_name_ok(bad[i], &err));
        g_assert_nonnull(strstr(error_get_pretty(err), "group:"));
        error_free(err);
    }
}

/* Layer keys */

static void settle(void)
{
    g_usleep(1100 * 1000);      /* keys are refused for a second */
}

static void test_layer_keys(void)
{
    g_autofree char *a = NULL, *b = NULL, *link_name = NULL;
    char key[DEDUP_LAYER_KEY_SIZE], other[DEDUP_LAYER_KEY_SIZE];
    const char *why = NULL;
    int fd;

    make_root();
    a = sub("a");
    b = sub("b");
    link_name = sub("link");
    g_assert_true(g_file_set_contents(a, "0123", 4, NULL));
    fd = open(a, O_RDWR);
    g_assert_cmpint(dedup_layer_key(a, "raw", 1, key, &why), ==,
                    DEDUP_KEY_NONE);
    g_assert_nonnull(strstr(why, "within the last second"));
    settle();
    g_assert_cmpint(dedup_layer_key(a, "raw", 1, key, &why), ==,
                    DEDUP_KEY_SHARED);
    g_assert_cmpint(dedup_layer_key(a, "qcow2", 1, other, &why), ==,
                    DEDUP_KEY_SHARED);
    g_assert_cmpstr(key, !=, other);

    /* two names of one file; a link changes the change time, too */
    g_assert_cmpint(link(a, link_name), ==, 0);
    settle();
    g_assert_cmpint(dedup_layer_key(a, "raw", 1, key, &why), ==,
                    DEDUP_KEY_SHARED);
    g_assert_cmpint(dedup_layer_key(link_name, "raw", 1, other, &why), ==,
                    DEDUP_KEY_SHARED);
    g_assert_cmpstr(key, ==, other);

    /* rewritten in place, with the old modification time put back */
    struct stat st;
    g_assert_cmpint(fstat(fd, &st), ==, 0);
    g_assert_cmpint(pwrite(fd, "9", 1, 0), ==, 1);
    struct timespec times[2] = { st.st_atim, st.st_mtim };
    g_assert_cmpint(futimens(fd, times), ==, 0);
    settle();
    g_assert_cmpint(dedup_layer_key(a, "raw", 1, other, &why), ==,
                    DEDUP_KEY_SHARED);
    g_assert_cmpstr(key, !=, other);

    /* replaced: not what is open */
    g_assert_true(g_file_set_contents(b, "0123", 4, NULL));
    g_assert_cmpint(rename(b, a), ==, 0);
    settle();
    g_assert_cmpint(dedup_layer_key(a, "raw", 1, other, &why), ==,
                    DEDUP_KEY_NONE);
    g_assert_nonnull(strstr(why, "replaced"));
    close(fd);
    g_assert_cmpint(dedup_layer_key(root, "raw", 1, other, &why), ==,
                    DEDUP_KEY_NONE);
    g_assert_cmpint(dedup_layer_key("/no/such/file", "raw", 1, other, &why), ==,
                    DEDUP_KEY_NONE);

    g_assert_cmpint(strlen(key), ==, DEDUP_LAYER_KEY_SIZE - 1);
    drop_root();
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/dedup/index/frame-life", test_frame_life);
    g_test_add_func("/dedup/index/frame-wild-ids", test_frame_wild_ids);
    g_test_add_func("/dedup/index/generation-wrap", test_generation_wrap);
    g_test_add_func("/dedup/index/frame-processes", test_frame_processes);
    g_test_add_func("/dedup/index/map", test_map);
    g_test_add_func("/dedup/index/map-damaged", test_map_damaged);
    g_test_add_func("/dedup/dir/first-and-last", test_dir_first_and_last);
    g_test_add_func("/dedup/index/tmpfs-full", test_tmpfs_full);
    g_test_add_func("/dedup/dir/killed", test_dir_killed);
    g_test_add_func("/dedup/dir/killed-early", test_dir_killed_early);
    g_test_add_func("/dedup/dir/sweep", test_dir_sweep);
    g_test_add_func("/dedup/dir/refused", test_dir_refused);
    g_test_add_func("/dedup/dir/index-truncated", test_index_truncated);
    g_test_add_func("/dedup/dir/not-tmpfs", test_not_tmpfs);
    g_test_add_func("/dedup/dir/group-names", test_group_names);
    g_test_add_func("/dedup/layer/keys", test_layer_keys);
    return g_test_run();
}
