##
# @DedupShareStore:
#
# Where the frames of a dedup-share group are kept.
#
# @auto: @xen in a Xen guest's device model, else @linux; if that does
#     not work, @off, with a warning.
#
# @xen: a Xen domain that never runs holds the store daemon's frames;
#     guest frames are given by Xen memory sharing.
#
# @linux: a store daemon's memory holds the frames; guest pages are
#     given by private mappings of it.
#
# @off: nothing is shared, requests pass through.
#
# Since: 10.0
##
{ 'enum': 'DedupShareStore',
  'data': [ 'auto', 'xen', 'linux', 'off' ],
  'if': 'CONFIG_DEDUP_SHARE' }

##
# @DedupShareAdmission:
#
# What enters the store of a dedup-share group.
#
# @first-read: every block, when it is first read
#
# @second-read: only content that is read a second time, by whatever
#     guest and from whatever block
#
# Since: 10.0
##
{ 'enum': 'DedupShareAdmission',
  'data': [ 'first-read', 'second-read' ],
  'if': 'CONFIG_DEDUP_SHARE' }

##
# @DedupShareScope:
#
# Which blocks of a chain of images a dedup-share filter shares.
#
# @base: those of images that nobody writes to, and that the group's
#     store daemon can have a lease on: regular files on ext4, XFS or
#     btrfs.  What a guest has written stays its own.
#
# @all: the others, too.  They are read as without the filter, and are
#     found by their content: full copies of an image share, and images
#     on block devices or network storage.
#
# Since: 10.0
##
{ 'enum': 'DedupShareScope',
  'data': [ 'base', 'all' ],
  'if': 'CONFIG_DEDUP_SHARE' }

##
# @BlockdevOptionsDedupShare:
#
# Driver specific block device options for the dedup-share filter,
# which lets guests that read the same blocks hold one copy of them in
# memory.
#
# @group: the trust domain: only guests whose filters name the same
#     group share frames.  1 to 32 letters, digits, '-', '_' or '.',
#     beginning with a letter or digit.  (default: "default")
#
# @store: where the frames are kept (default: auto)
#
# @store-size: the most that the store may hold, in bytes; a multiple
#     of 4096.  If a store daemon is running it must have been started
#     with the same.  Else it is for the one that this filter starts,
#     with the Linux store; that takes no more than a quarter of what
#     there is.  (default: an eighth of the memory of the host, or of
#     QEMU's cgroup)
#
# @share: which blocks are shared (default: base)
#
# @origin: the image that this node's image is a copy of, by means of
#     the file system, as ``cp --reflink`` makes it.  Blocks that the
#     guest has not written since are those of the origin, and are shared
#     as such, with other copies, too, and without I/O.  Both images are
#     raw, in files on one XFS or btrfs, and the store daemon can have a
#     lease on the origin.  It is opened read-only unless something else
#     is said, and must not be written to.  (default: none)
#
# @share-encrypted: with @share all, also where an image of the chain is
#     encrypted; who can read the group's store can then read what the
#     guest reads (default: off)
#
# @timeout: how long the store daemon may be silent before a request is
#     served without it, in seconds (default: 2)
#
# @admission: what this node's reads bring into the store
#     (default: first-read)
#
# @socket: where the group's store daemon, qemu-dedup-store, listens
#     (default: "/run/qemu-dedup-store/GROUP.sock", or below
#     XDG_RUNTIME_DIR for a user who cannot use that)
#
# @x-copy: share in a program that has no guest, as qemu-io has none, by
#     copies; these pass requests through otherwise (default: off)
#
# Features:
#
# @unstable: Member @x-copy is for tests.
#
# Since: 10.0
##
{ 'struct': 'BlockdevOptionsDedupShare',
  'base': 'BlockdevOptionsGenericFormat',
  'data': { '*group': 'str',
            '*store': 'DedupShareStore',
            '*store-size': 'size',
            '*share': 'DedupShareScope',
            '*origin': 'BlockdevRef',
            '*share-encrypted': 'bool',
            '*timeout': 'uint32',
            '*admission': 'DedupShareAdmission',
            '*socket': 'str',
            '*x-copy': { 'type': 'bool',
                         'features': [ 'unstable' ] } },
  'if': 'CONFIG_DEDUP_SHARE' }

