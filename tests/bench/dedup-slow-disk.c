/*
 * dedup-share: a file whose reads take as long as those of a slow disk
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 *   dedup-slow-disk --file=FILE [--latency-us=N] [--mb-per-s=N]
 *                   [--hang-file=FILE] DIRECTORY
 *
 * A FUSE file system on DIRECTORY with one file, "disk".  Each read of it takes
 * so many microseconds, many of them at once, and all together are no faster
 * than so many megabytes a second.  Writes are passed on without a delay.  A
 * loop device over it is a slow disk.  While the file of --hang-file is there,
 * all calls hang.  Stays in the foreground with -f; further options are those
 * of FUSE.
 */

#define FUSE_USE_VERSION 312
#include "qemu/osdep.h"
#include <fuse.h>

/* Requests in flight: of the file system, and threads that wait for them. */
#define MAX_REQUESTS 256

static struct {
    char *file;
    unsigned latency_us;
    unsigned mb_per_s;          /* 0: without a limit */
    char *hang_file;
} options;

static int fd;

/* When all that was asked for so far will have been transferred, ns. */
static uint64_t transferred;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

/* Wait as long as a disk takes for a read of @size bytes. */
static void delay(size_t size)
{
    uint64_t at = now_ns();
    struct timespec t;

    if (options.mb_per_s) {
        pthread_mutex_lock(&lock);
        transferred = MAX(transferred, at) + size * 1000ULL / options.mb_per_s;
        at = transferred;
        pthread_mutex_unlock(&lock);
    }
    at += options.latency_us * 1000ULL;
    t.tv_sec = at / 1000000000ULL;
    t.tv_nsec = at % 1000000000ULL;
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) {
        /* go on */
    }
}

static void hang(void)
{
    while (options.hang_file && !access(options.hang_file, F_OK)) {
        g_usleep(20000);
    }
}

static void *slow_init(struct fuse_conn_info *conn, struct fuse_config *config)
{
    conn->max_background = MAX_REQUESTS;
    conn->congestion_threshold = MAX_REQUESTS;
    return NULL;
}

static bool is_disk(const char *path)
{
    return !strcmp(path, "/disk");
}

static int slow_getattr(const char *path, struct stat *st,
                        struct fuse_file_info *info)
{
    hang();
    if (is_disk(path)) {
        return fstat(fd, st) < 0 ? -errno : 0;
    }
    *st = (struct stat) { .st_mode = S_IFDIR | 0700, .st_nlink = 2 };
    return strcmp(path, "/") ? -ENOENT : 0;
}

static int slow_readdir(const char *path, void *buf, fuse_fill_dir_t fill,
                        off_t offset, struct fuse_file_info *info,
                        enum fuse_readdir_flags flags)
{
    fill(buf, "disk", NULL, 0, 0);
    return 0;
}

static int slow_open(const char *path, struct fuse_file_info *info)
{
    info->direct_io = 1;        /* each read comes here */
    return is_disk(path) ? 0 : -ENOENT;
}

static int slow_read(const char *path, char *buf, size_t size, off_t offset,
                     struct fuse_file_info *info)
{
    ssize_t got = pread(fd, buf, size, offset);

    hang();
    if (got < 0) {
        return -errno;
    }
    delay(got);
    return got;
}

static int slow_write(const char *path, const char *buf, size_t size,
                      off_t offset, struct fuse_file_info *info)
{
    ssize_t done = pwrite(fd, buf, size, offset);

    return done < 0 ? -errno : done;
}

/* At each close(). */
static int slow_flush(const char *path, struct fuse_file_info *info)
{
    hang();
    return 0;
}

static int slow_fsync(const char *path, int datasync,
                      struct fuse_file_info *info)
{
    return fdatasync(fd) < 0 ? -errno : 0;
}

static const struct fuse_operations slow_ops = {
    .init = slow_init,
    .getattr = slow_getattr,
    .readdir = slow_readdir,
    .open = slow_open,
    .read = slow_read,
    .write = slow_write,
    .flush = slow_flush,
    .fsync = slow_fsync,
};

static const struct fuse_opt slow_opts[] = {
    { "--file=%s", offsetof(typeof(options), file), 0 },
    { "--latency-us=%u", offsetof(typeof(options), latency_us), 0 },
    { "--mb-per-s=%u", offsetof(typeof(options), mb_per_s), 0 },
    { "--hang-file=%s", offsetof(typeof(options), hang_file), 0 },
    FUSE_OPT_END
};

int main(int argc, char **argv)
{
    struct fuse_args args = FUSE_ARGS_INIT(argc, argv);
    g_autofree char *threads = g_strdup_printf("-omax_threads=%d",
                                               MAX_REQUESTS);

    if (fuse_opt_parse(&args, &options, slow_opts, NULL) < 0 ||
        !options.file) {
        fprintf(stderr, "usage: %s --file=FILE [--latency-us=N] "
                "[--mb-per-s=N] [--hang-file=FILE] [-f] DIRECTORY\n",
                argv[0]);
        return 2;
    }
    fd = open(options.file, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        fprintf(stderr, "%s: %s: %s\n", argv[0], options.file,
                strerror(errno));
        return 1;
    }
    fuse_opt_add_arg(&args, threads);
    return fuse_main(args.argc, args.argv, &slow_ops, NULL);
}
