# SPDX-License-Identifier: GPL-2.0-or-later
"""The places where QEMU's own files call dedup-share.

Each hook is (file, mode, anchor, text).  The anchor is a regular expression
(MULTILINE) that must match exactly once in the file.  'after' and 'before'
put the text right behind or in front of the match; 'end' appends it to the
file and needs no anchor.  A text '@NAME' is read from integrate/NAME.
"""

IF = "'if': 'CONFIG_DEDUP_SHARE'"

# Directories of the overlay that are laid over the tree, same names.
OVERLAY = ['block', 'configs', 'dedup-store', 'docs', 'hw', 'include', 'qapi',
           'tests']
# ... except these, which only make sense in the overlay itself.
PRIVATE = ['tests/lab', 'tests/check', 'tests/hostile',
           'tests/stress/corpus-store']

BUILD = [
    ('meson_options.txt', 'end', None,
     "option('dedup_share', type: 'feature', value: 'auto',\n"
     "       description: 'dedup-share block filter')\n"),
    ('scripts/meson-buildoptions.sh', 'after',
     r'^_meson_option_parse\(\) \{\n  case \$1 in\n',
     "    --enable-dedup-share) printf \"%s\" -Ddedup_share=enabled ;;\n"
     "    --disable-dedup-share) printf \"%s\" -Ddedup_share=disabled ;;\n"),
    ('meson.build', 'after',
     r"^config_host_data\.set\('CONFIG_REPLICATION',.*\n",
     "config_host_data.set('CONFIG_DEDUP_SHARE', "
     "get_option('dedup_share').allowed() and host_os == 'linux')\n"),
    ('meson.build', 'before', r"^subdir\('qapi'\)\n",
     "trace_events_subdirs += ['block/dedup-share', 'dedup-store', "
     "'hw/xen/memshr']\n"),
    ('meson.build', 'before', r"^if xkbcommon\.found\(\)\n",
     "subdir('dedup-store')\n"),
    ('block/meson.build', 'before', r"^subdir\('monitor'\)\n",
     "subdir('dedup-share')\n"),
    ('hw/xen/meson.build', 'end', None, "subdir('memshr')\n"),
]

QAPI = [
    ('qapi/meson.build', 'after', r"^qapi_all_modules = \[\n",
     "  'dedup-share',\n"),
    ('qapi/qapi-schema.json', 'after',
     r"^\{ 'include': 'block-export\.json' \}\n",
     "{ 'include': 'dedup-share.json' }\n"),
    ('storage-daemon/qapi/qapi-schema.json', 'after',
     r"^\{ 'include': '\.\./\.\./qapi/block-export\.json' \}\n",
     "{ 'include': '../../qapi/dedup-share.json' }\n"),
    ('qapi/block-core.json', 'after',
     r"^\{ 'enum': 'BlockdevDriver',\n  'data': \[",
     " { 'name': 'dedup-share', %s },\n           " % IF),
    ('qapi/block-core.json', 'after', r"^# @BlockdevDriver:\n(?:#.*\n)*?"
     r"(?=# @throttle: Since 2\.11\n)",
     "# @dedup-share: Since 10.0\n#\n"),
    ('qapi/block-core.json', 'before', r"^##\n# @BlockdevOptions:\n",
     '@block-core.json.frag'),
    ('qapi/block-core.json', 'after',
     r"^\{ 'union': 'BlockdevOptions',\n(?:.*\n)*?  'data': \{\n",
     "      'dedup-share': { 'type': 'BlockdevOptionsDedupShare',\n"
     "                       %s },\n" % IF),
    ('hmp-commands-info.hx', 'end', None, '@hmp-info.hx.frag'),
]

# A guest's read is offered to the filter before QEMU maps its pages; the
# map cache leaves the pages of others out of what it maps.
DATAPATH = [
    ('system/dma-helpers.c', 'after', r'^#include "system/dma\.h"\n',
     '#include "block/dedup-share-dma.h"\n'),
    ('system/dma-helpers.c', 'after',
     r"^BlockAIOCB \*dma_blk_read\(BlockBackend \*blk,\n(?:.*\n)*?\{\n",
     "    DEDUP_SHARE_DMA_READ(blk, sg, offset, align, cb, opaque);\n"),
    ('hw/xen/xen-mapcache.c', 'before', r'^static void xen_remap_bucket\(',
     '#include "memshr/mapcache.c.inc"\n\n'),
    ('hw/xen/xen-mapcache.c', 'before',
     r'^    if \(mc->last_entry != NULL &&\n'
     r'        mc->last_entry->paddr_index == address_index &&\n'
     r'        !lock',
     "    xen_memshr_map_want(mc, phys_addr, size, lock);\n"),
    ('hw/xen/xen-mapcache.c', 'before',
     r'^    while \(entry && \(entry->paddr_index != paddr_index \|\| '
     r'entry->size != size\)\) \{\n        pentry = entry;\n',
     "    entry = xen_memshr_entry_at(entry, buffer, &pentry);\n"),
    ('hw/xen/xen-mapcache.c', 'before',
     r'^    while \(entry && \(entry->paddr_index != paddr_index \|\| '
     r'entry->size != size\)\) \{\n        entry = entry->next;\n',
     "    entry = xen_memshr_entry_at(entry, ptr, NULL);\n"),
    ('hw/xen/xen-mapcache.c', 'before',
     r'^    mc->last_entry = NULL;\n\n    mapcache_unlock\(mc\);\n',
     "    xen_memshr_invalidate(mc);\n"),
]

# The store daemon's client opens anew what a 'file' node has open.
FILES = [
    ('block/file-posix.c', 'end', None,
     '#ifdef CONFIG_DEDUP_SHARE\n#include "dedup-share/leased.h"\n'
     '#include "dedup-share/file-posix.c.inc"\n#endif\n'),
]

# The same for PV disks; and a property that puts a filter over them.
PV_DISKS = [
    ('include/hw/xen/xen-block.h', 'after',
     r'^#include "hw/xen/xen-bus\.h"\n',
     '#include "hw/xen/dedup-share-disk.h"\n'),
    ('include/hw/xen/xen-block.h', 'after',
     r'^    unsigned int max_ring_page_order;\n',
     "    DedupShareDisk dedup_share;\n"),
    ('hw/block/xen-block.c', 'after',
     r'^static const Property xen_block_props\[\] = \{\n',
     "#ifdef CONFIG_DEDUP_SHARE\n"
     "    DEFINE_PROP_STRING(\"dedup-share\", XenBlockDevice,\n"
     "                       props.dedup_share.options),\n#endif\n"),
    ('hw/block/xen-block.c', 'before',
     r'^    if \(!blkconf_apply_backend_options\(conf, '
     r'blockdev->info & VDISK_READONLY,\n',
     "    DEDUP_SHARE_DISK_REALIZE(&blockdev->props, errp);\n"),
    ('hw/block/xen-block.c', 'after',
     r'^    blockdev->dataplane = NULL;\n',
     "    DEDUP_SHARE_DISK_UNREALIZE(&blockdev->props);\n"),
    ('hw/block/dataplane/xen-block.c', 'after',
     r'^    QEMUIOVector v;\n    void \*buf;\n    size_t size;\n',
     "    unsigned dedup_given;\n"),
    ('hw/block/dataplane/xen-block.c', 'after',
     r'^    BlockBackend \*blk;\n    unsigned int sector_size;\n',
     "    BlockBackendPublic *blk_public;\n    bool dedup_paused;\n"),
    ('hw/block/dataplane/xen-block.c', 'after',
     r'^void xen_block_dataplane_detach\(XenBlockDataPlane \*dataplane\)\n'
     r'\{\n',
     "    xen_block_dedup_pause(dataplane, true);\n"),
    ('hw/block/dataplane/xen-block.c', 'after',
     r'^void xen_block_dataplane_attach\(XenBlockDataPlane \*dataplane\)\n'
     r'\{\n',
     "    xen_block_dedup_pause(dataplane, false);\n"),
    ('hw/block/dataplane/xen-block.c', 'after',
     r'^    dataplane->blk = blk;\n',
     "    dataplane->blk_public = blk_get_public(blk);\n"),
    ('hw/block/dataplane/xen-block.c', 'before',
     r'^static int xen_block_copy_request\(XenBlockRequest \*request\)\n',
     '#include "hw/xen/memshr/xen-block.c.inc"\n\n'),
    ('hw/block/dataplane/xen-block.c', 'before',
     r'^    xen_device_copy_grant_refs\(xendev, to_domain, segs, count, '
     r'&local_err\);\n',
     "    count = xen_block_dedup_left(request, segs, count);\n"
     "    if (!count) { return 0; }\n"),
    ('hw/block/dataplane/xen-block.c', 'before',
     r'^        blk_aio_preadv\(dataplane->blk, request->start, '
     r'&request->v, 0,\n',
     "        if (xen_block_dedup_read(request)) { break; }\n"),
    ('hw/block/dataplane/xen-block.c', 'before',
     r'^    g_free\(dataplane->ring_ref\);\n'
     r'    dataplane->ring_ref = NULL;\n\}\n',
     "    xen_block_dedup_stop(dataplane);\n"),
]

# Unplugging an emulated disk drops the monitor's reference of its backend.  One
# that was made of a node by -device has none, and would be freed twice.
UNPLUG = [
    ('hw/i386/xen/xen_platform.c', 'before',
     r'^        blk_detach_dev\(blk, DEVICE\(idedev\)\);\n',
     "        if (!*blk_name(blk)) { blk_ref(blk); }\n"),
]

# RAM that is discarded maps no frame before it is; RAM that is pinned is not
# mapped over any more.
GUEST_RAM = [
    ('system/physmem.c', 'after', r'^#include "exec/ram_addr\.h"\n',
     '#include "block/dedup-share-ram.h"\n'),
    ('system/physmem.c', 'before',
     r'^        errno = ENOTSUP; /\* If we are missing MADVISE etc \*/\n',
     "        DEDUP_SHARE_RAM_DISCARD(rb, start, length);\n"),
    ('system/physmem.c', 'before',
     r'^        trace_ram_block_discard_range\(rb->idstr, host_startaddr, '
     r'length,\n',
     "        DEDUP_SHARE_RAM_DISCARDED(rb, start, length);\n"),
    ('system/physmem.c', 'after',
     r'^        ram_block_discard_disabled_cnt\+\+;\n    \}\n'
     r'    ram_block_discard_disable_mutex_unlock\(\);\n',
     "    DEDUP_SHARE_RAM_PINNED(state);\n"),
    ('system/physmem.c', 'after',
     r'^        ram_block_uncoordinated_discard_disabled_cnt\+\+;\n    \}\n'
     r'    ram_block_discard_disable_mutex_unlock\(\);\n',
     "    DEDUP_SHARE_RAM_PINNED(state);      /* by VFIO */\n"),
]

TESTS = [
    ('tests/unit/meson.build', 'before', r"^test_env = environment\(\)\n",
     "tests += config_host_data.get('CONFIG_DEDUP_SHARE') ? "
     "{'test-dedup-given': "
     "[testblock, files('dedup-guest-ram.c')],\n"
     "                  'test-dedup-read': "
     "[testblock, files('dedup-guest-ram.c', 'dedup-daemon.c', "
     "'dedup-nodes.c')],\n"
     "                  'test-dedup-asked': "
     "[testblock, files('dedup-guest-ram.c', 'dedup-daemon.c', "
     "'dedup-nodes.c')],\n"
     "                  'test-dedup-origin': "
     "[testblock, files('dedup-guest-ram.c', 'dedup-daemon.c', "
     "'dedup-nodes.c')],\n"
     "                  'test-dedup-client': "
     "[testblock, files('dedup-guest-ram.c', 'dedup-daemon.c', "
     "'iothread.c')]} : {}\n"
     "if config_host_data.get('CONFIG_DEDUP_SHARE') and have_tools\n"
     "  tests += {'test-dedup-store': [dedup_store_deps, dedup_store_files]}\n"
     "endif\n"),
    ('tests/qtest/meson.build', 'before', r"^qtest_executables = \{\}\n",
     "qtests_x86_64 += config_host_data.get('CONFIG_DEDUP_SHARE') ? "
     "['dedup-share-test', 'dedup-share-linux-test',\n"
     "                   'dedup-share-ram-test'] : []\n"
     "qtests += {'dedup-share-linux-test': files('../unit/dedup-daemon.c'),\n"
     "           'dedup-share-ram-test': files('../unit/dedup-daemon.c')}\n"),
]

STRESS = [
    ('tests/meson.build', 'before', r"^subdir\('unit'\)\n",
     "subdir('stress')\n"),
]

BENCH = [
    ('tests/bench/meson.build', 'end', None,
     "if have_block and config_host_data.get('CONFIG_DEDUP_SHARE')\n"
     "  foreach b : ['dedup-share-bench']\n"
     "    executable(b, b + '.c', '../unit/dedup-guest-ram.c',\n"
     "               '../unit/dedup-daemon.c',\n"
     "               dependencies: [qemuutil, block])\n"
     "  endforeach\n"
     "  executable('dedup-share-floor', 'dedup-share-floor.c',\n"
     "             dependencies: [qemuutil, dependency('libxxhash')])\n"
     "  dedup_fuse = dependency('fuse3', version: '>=3.12', required: false)\n"
     "  if dedup_fuse.found()\n"
     "    executable('dedup-slow-disk', 'dedup-slow-disk.c',\n"
     "               dependencies: [glib, dedup_fuse])\n"
     "  endif\nendif\n"),
]

DOCS = [
    ('docs/system/index.rst', 'after', r"^   pr-manager\n",
     "   dedup-share\n"),
    ('docs/tools/index.rst', 'after', r"^   qemu-pr-helper\n",
     "   qemu-dedup-store\n"),
    ('docs/conf.py', 'before', r"^    \('tools/qemu-pr-helper', ",
     "    ('tools/qemu-dedup-store', 'qemu-dedup-store',\n"
     "     'QEMU dedup-share store daemon',\n"
     "     [], 8),\n"),
    ('docs/meson.build', 'before', r"^        'qemu-pr-helper\.8': ",
     "        'qemu-dedup-store.8': (have_tools ? 'man8' : ''),\n"),
    ('docs/devel/index-internals.rst', 'after', r"^   block-coroutine-wrapper\n",
     "   dedup-share/index\n"),
]

HOOKS = (BUILD + QAPI + DATAPATH + FILES + PV_DISKS + UNPLUG + GUEST_RAM +
         TESTS + STRESS + BENCH + DOCS)
