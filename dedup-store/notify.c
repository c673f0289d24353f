/*
 * qemu-dedup-store: what the service manager is told
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#ifdef CONFIG_DEDUP_STORE_SYSTEMD
#include <systemd/sd-daemon.h>
#endif
#include "qapi/error.h"
#include "notify.h"

#ifdef CONFIG_DEDUP_STORE_SYSTEMD
bool notify_check(Error **errp)
{
    return true;
}

static void notify(const char *state)
{
    sd_notify(false, state);    /* if that fails, nobody is to be told */
}
#else
bool notify_check(Error **errp)
{
    if (getenv("NOTIFY_SOCKET")) {
        error_setg(errp, "systemd waits to be notified, and this program was "
                   "built without libsystemd; its unit has to say Type=simple, "
                   "and no WatchdogSec=");
        return false;
    }
    return true;
}

static void notify(const char *state)
{
}
#endif

void notify_ready(void)
{
    notify("READY=1");
}

void notify_alive(void)
{
    notify("WATCHDOG=1");
}

void notify_stopping(void)
{
    notify("STOPPING=1");
}
