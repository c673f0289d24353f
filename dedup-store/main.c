/*
 * qemu-dedup-store: the owner of the frames that a group of guests shares
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See docs/tools/qemu-dedup-store.rst, and include/dedup-store/protocol.h.
 */

#include "qemu/osdep.h"
#include <getopt.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include "qapi/error.h"
#include "qemu-version.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/host-utils.h"
#include "qemu/log.h"
#include "qemu/module.h"
#include "qemu/config-file.h"
#include "qemu/systemd.h"
#include "qemu/units.h"
#include "qemu/help-texts.h"
#include "trace/control.h"
#include "dedup-store/socket.h"
#include "notify.h"
#include "server.h"
#include "tool.h"

#define DEFAULT_LAYER_IDLE 60
#define DEFAULT_MOST 75

static struct {
    const char *command;        /* NULL: be the daemon */
    const char *group;
    const char *store;
    const char *size;
    char *socket;
    const char *pidfile;
    bool daemonize;
    bool json;
    unsigned idle_exit, layer_idle, most;
} opts = { .group = "default", .store = "linux", .most = DEFAULT_MOST,
           .layer_idle = DEFAULT_LAYER_IDLE };

static void usage(const char *name)
{
    printf("Usage: %s [OPTION]...\n"
"  or:  %s status [--json] [--group=NAME | --socket=PATH]\n"
"  or:  %s reclaim [--group=NAME | --socket=PATH]\n"
"Store daemon of a group of QEMUs with dedup-share\n"
"\n"
"  -g, --group=NAME          the group (default 'default')\n"
"  -S, --store=KIND          what frames are made of: linux (default) or xen\n"
"  -s, --size=SIZE           most memory that it may take, with an optional\n"
"                            suffix k, M, G or T (default: an eighth of what\n"
"                            there is)\n"
"  -m, --most=PERCENT        take no more of the memory that there is, for the\n"
"                            host or in a cgroup, whatever the size (default %d)\n"
"  -k, --socket=PATH         where it listens (default\n"
"                            " DEDUP_SOCKET_DIR "/GROUP.sock;\n"
"                            below XDG_RUNTIME_DIR for who cannot use that)\n"
"  -i, --idle-exit=SECONDS   end when nobody has been there for so long\n"
"  -l, --layer-idle=SECONDS  keep what is known of an image without clients\n"
"                            for so long (default %d)\n"
"  -d, --daemonize           run in the background\n"
"  -f, --pidfile=PATH        write the process's number there\n"
"  -L, --log=FILE            log to FILE\n"
"  -T, --trace [[enable=]<pattern>][,events=<file>][,file=<file>]\n"
"                            specify tracing options\n"
"  -j, --json                with status: as JSON\n"
"  -h, --help                display this help and exit\n"
"  -V, --version             output version information and exit\n"
"\n"
QEMU_HELP_BOTTOM "\n", name, name, name, DEFAULT_MOST,
       DEFAULT_LAYER_IDLE);
}

static unsigned parse_number(const char *option, const char *text,
                             const char *what, unsigned least, unsigned most)
{
    unsigned value;

    if (qemu_strtoui(text, NULL, 10, &value) < 0 || value < least ||
        value > most) {
        error_report("%s: '%s' is no %s from %u to %u", option, text, what,
                     least, most);
        exit(1);
    }
    return value;
}

static unsigned parse_seconds(const char *option, const char *text)
{
    return parse_number(option, text, "number of seconds", 0, 1000000);
}

static const struct option long_options[] = {
    { "group", required_argument, NULL, 'g' },
    { "store", required_argument, NULL, 'S' },
    { "size", required_argument, NULL, 's' },
    { "most", required_argument, NULL, 'm' },
    { "socket", required_argument, NULL, 'k' },
    { "idle-exit", required_argument, NULL, 'i' },
    { "layer-idle", required_argument, NULL, 'l' },
    { "daemonize", no_argument, NULL, 'd' },
    { "pidfile", required_argument, NULL, 'f' },
    { "log", required_argument, NULL, 'L' },
    { "trace", required_argument, NULL, 'T' },
    { "json", no_argument, NULL, 'j' },
    { "help", no_argument, NULL, 'h' },
    { "version", no_argument, NULL, 'V' },
    { NULL }
};

static void parse_option(int option, const char *name)
{
    switch (option) {
    case 'g':
        opts.group = optarg;
        break;
    case 'S':
        opts.store = optarg;
        break;
    case 's':
        opts.size = optarg;
        break;
    case 'm':
        opts.most = parse_number("--most", optarg, "percentage", 1, 100);
        break;
    case 'k':
        opts.socket = g_canonicalize_filename(optarg, NULL);
        break;
    case 'i':
        opts.idle_exit = parse_seconds("--idle-exit", optarg);
        break;
    case 'l':
        opts.layer_idle = parse_seconds("--layer-idle", optarg);
        break;
    case 'd':
        opts.daemonize = true;
        break;
    case 'f':
        opts.pidfile = g_canonicalize_filename(optarg, NULL);
        break;
    case 'L':
        qemu_set_log_filename(optarg, &error_fatal);
        break;
    case 'T':
        trace_opt_parse(optarg);
        break;
    case 'j':
        opts.json = true;
        break;
    case 'h':
        usage(name);
        exit(0);
    case 'V':
        printf("%s version " QEMU_FULL_VERSION "\n", name);
        exit(0);
    default:
        error_printf("Try '%s --help' for more information.\n", name);
        exit(1);
    }
}

static void parse_options(int argc, char **argv)
{
    int option;

    while ((option = getopt_long(argc, argv, "g:S:s:m:k:i:l:df:L:T:jhV",
                                 long_options, NULL)) != -1) {
        parse_option(option, argv[0]);
    }
    if (optind < argc) {
        opts.command = argv[optind++];
    }
    if (optind < argc) {
        error_report("unexpected argument '%s'", argv[optind]);
        exit(1);
    }
    if (!opts.group[0] || opts.group[0] == '.' || strchr(opts.group, '/') ||
        strlen(opts.group) > 32) {
        error_report("--group: '%s' is no name of a group: 1 to 32 "
                     "characters, without '/', and not '.' first", opts.group);
        exit(1);
    }
    opts.socket = opts.socket ?: dedup_socket_path(opts.group);
}

/* What frames are made of. */
static const FramesOps *find_ops(void)
{
    if (!strcmp(opts.store, "linux")) {
        return &frames_linux;
    }
    if (strcmp(opts.store, "xen")) {
        error_report("--store: '%s' is not known; use linux or xen",
                     opts.store);
        exit(1);
    }
#ifdef CONFIG_DEDUP_STORE_XEN
    return &frames_xen;
#else
    error_report("--store: this program was built without Xen; use linux");
    exit(1);
#endif
}

/* What --size says; 0: nothing. */
static uint64_t parse_size(void)
{
    uint64_t size = 0;

    if (opts.size && (qemu_strtosz(opts.size, NULL, &size) < 0 || !size)) {
        error_report("--size: '%s' is no size; say 4G, for example",
                     opts.size);
        exit(1);
    }
    return size;
}

/* The size that was @asked for, or what there is room for. */
static uint64_t choose_size(const FramesOps *ops, uint64_t asked)
{
    uint64_t memory = ops->host_memory();
    uint64_t most = muldiv64(memory, opts.most, 100);
    uint64_t size = asked ?: MIN(memory / 8, most);
    g_autofree char *text = NULL;

    if (!memory) {
        error_report("--store: cannot talk to Xen; a Xen store is for dom0");
        exit(1);
    }
    if (size > most) {
        text = size_to_str(most);
        warn_report("--size: there is less memory, for the host or by the "
                    "limit of a cgroup; the store has %s", text);
        size = most;
    }
    return size;
}

/* A THP of the tmpfs would keep the memory of frames that are dropped. */
static void warn_of_huge_pages(void)
{
    g_autofree char *text = NULL;

    if (g_file_get_contents("/sys/kernel/mm/transparent_hugepage/"
                            "shmem_enabled", &text, NULL, NULL) &&
        (strstr(text, "[always]") || strstr(text, "[force]"))) {
        warn_report("transparent_hugepage/shmem_enabled is 'always': memory "
                    "of single frames does not come back; set it to 'never' "
                    "or 'advise'");
    }
}

/*
 * Held as long as the process lives: who has it may remove the socket.  A
 * daemon that ends removes it, so what was locked has to be what is there.
 */
static void lock_socket(const char *path)
{
    g_autofree char *lock = g_strconcat(path, ".lock", NULL);
    struct stat ours, there;
    int fd;

    do {
        fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (fd < 0) {
            error_report("--socket: cannot make '%s': %s; make the directory, "
                         "which only root and the store daemon's user may "
                         "write to", lock, strerror(errno));
            exit(1);
        }
        if (qemu_lock_fd(fd, 0, 0, true) < 0) {
            error_report("--socket: a store daemon listens at '%s' already",
                         path);
            exit(DEDUP_EXIT_TAKEN);
        }
    } while (fstat(fd, &ours) < 0 || stat(lock, &there) < 0 ||
             ours.st_ino != there.st_ino);
}

/* The default directory is made, if this is in it; another one is not. */
static void make_directory(const char *path)
{
    g_autofree char *dir = g_path_get_dirname(path);
    g_autofree char *ours = dedup_socket_dir();

    if (!strcmp(dir, ours)) {
        g_mkdir_with_parents(dir, 0755);        /* or what follows fails */
    }
}

/* Whoever sees the socket can connect: it gets its name when it listens. */
static int listen_at(const char *path)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    g_autofree char *new = g_strconcat(path, ".new", NULL);

    if (strlen(new) >= sizeof(addr.sun_path)) {
        error_report("--socket: '%s' is too long", path);
        exit(1);
    }
    pstrcpy(addr.sun_path, sizeof(addr.sun_path), new);
    make_directory(path);
    lock_socket(path);
    unlink(new);
    umask(0117);                /* 0660: the directory says who may connect */
    if (fd < 0 || bind(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0 ||
        listen(fd, SOMAXCONN) < 0 || rename(new, path) < 0) {
        error_report("--socket: cannot listen at '%s': %s", path,
                     strerror(errno));
        exit(1);
    }
    umask(0077);
    return fd;
}

/* One that systemd has passed. */
static void check_socket(int fd)
{
    int type = 0;
    socklen_t size = sizeof(type);

    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) < 0 ||
        type != SOCK_SEQPACKET) {
        error_report("systemd has passed another kind of socket; its unit "
                     "says ListenSequentialPacket=");
        exit(1);
    }
    g_unix_set_fd_nonblocking(fd, true, NULL);
}

static void be_prepared(void)
{
    struct rlimit limit;
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGIO);     /* of leases; only their thread waits for it */
    /* who has started us may have blocked others */
    pthread_sigmask(SIG_SETMASK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    if (!getrlimit(RLIMIT_NOFILE, &limit)) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);         /* it has all guests' memory */
}

/* Who comes now is to start another one. */
static void remove_socket(void)
{
    unlink(opts.socket);
}

/* The last thing that a daemon does. */
static void remove_lock(void)
{
    g_autofree char *lock = g_strconcat(opts.socket, ".lock", NULL);

    unlink(lock);
}

/* --- in the background ---------------------------------------------------- */

static int ready_fd = -1;

/*
 * Go on in a child.  The parent stays until that is ready, and ends with its
 * exit code if it does not get so far.  Before anything is opened that a child
 * cannot have, as what Xen's libraries open.
 */
static void daemonize(void)
{
    int fds[2], status;
    char byte;
    pid_t pid;

    pid = pipe2(fds, O_CLOEXEC) < 0 ? -1 : fork();
    if (pid < 0) {
        error_report("--daemonize: %s", strerror(errno));
        exit(1);
    }
    if (pid) {
        close(fds[1]);
        if (RETRY_ON_EINTR(read(fds[0], &byte, 1)) == 1) {
            _exit(0);
        }
        RETRY_ON_EINTR(waitpid(pid, &status, 0));
        _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
    }
    close(fds[0]);
    ready_fd = fds[1];
    setsid();
}

/* Clients can come; nobody sees what is said on the terminal any more. */
static void say_ready(void)
{
    int fd;

    if (ready_fd < 0) {
        return;
    }
    fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (chdir("/") < 0 || fd < 0 || dup2(fd, 0) < 0 || dup2(fd, 1) < 0 ||
        dup2(fd, 2) < 0 || write(ready_fd, "", 1) != 1) {
        error_report("--daemonize: %s", strerror(errno));
        exit(1);
    }
    close(fd);
    close(ready_fd);
}

/* It can start a thread, which a fork would leave behind. */
static void init_tracing(void)
{
    if (!trace_init_backends()) {
        exit(1);
    }
    trace_init_file();
    qemu_set_log(LOG_TRACE, &error_fatal);
}

static int run_daemon(void)
{
    const FramesOps *ops = find_ops();
    unsigned sockets = check_socket_activation();
    Error *err = NULL;
    uint64_t size;
    bool idle;

    if (!notify_check(&err)) {
        error_report_err(err);
        return 1;
    }
    if (sockets > 1) {
        error_report("systemd has passed %u sockets, not one", sockets);
        return 1;
    }
    server.asked = parse_size();
    size = choose_size(ops, server.asked);
    if (opts.daemonize) {
        daemonize();
    }
    init_tracing();
    if (ops == &frames_linux) {
        warn_of_huge_pages();
    }
    server.group = opts.group;
    server.idle_exit = opts.idle_exit;
    server.layer_idle = opts.layer_idle;
    server.listen_fd = sockets ? FIRST_SOCKET_ACTIVATION_FD
                               : listen_at(opts.socket);
    if (sockets) {
        check_socket(server.listen_fd);
    }
    /* the socket is ours: so is what earlier daemons there have left */
    server.store = store_new(ops, opts.group, opts.socket, size, &err);
    if (!server.store) {
        error_report_err(err);
        if (!sockets) {
            remove_socket();
            remove_lock();
        }
        return 1;
    }
    if (opts.pidfile) {
        qemu_write_pidfile(opts.pidfile, &error_fatal);
    }
    say_ready();
    notify_ready();
    be_prepared();
    idle = server_run(sockets ? NULL : remove_socket);
    if (idle) {
        store_free(server.store);
    }
    if (opts.pidfile) {
        unlink(opts.pidfile);
    }
    if (!sockets) {
        remove_lock();
    }
    return server.lost;
}

int main(int argc, char **argv)
{
    error_init(argv[0]);
    module_call_init(MODULE_INIT_TRACE);
    qemu_add_opts(&qemu_trace_opts);
    parse_options(argc, argv);
    if (!opts.command) {
        return run_daemon();
    }
    init_tracing();
    if (!strcmp(opts.command, "status")) {
        return tool_status(opts.socket, opts.json);
    }
    if (!strcmp(opts.command, "reclaim")) {
        return tool_reclaim(opts.socket);
    }
    error_report("'%s' is no command; use status or reclaim, or none",
                 opts.command);
    return 1;
}
