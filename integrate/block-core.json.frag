##
# @DedupShareStore:
#
# Where the frames of a dedup-share group are kept.
#
# @auto: @xen in a Xen guest's device model, else @linux; if that does
#     not work, @off, with a warning.
#
# @xen: a Xen domain without vCPUs owns the frames; guest frames are
#     given by Xen memory sharing.
#
# @linux: a file on a tmpfs holds the frames; guest pages are given by
#     private mappings of it.
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
#     of 4096.  The group's first user decides it; a later one must
#     say the same or nothing.  (default: an eighth of the host's
#     memory)
#
# @admission: what this node's reads bring into the store
#     (default: first-read)
#
# @index-dir: directory on a tmpfs that holds a directory for each
#     group (default: "/run/qemu-dedup-share")
#
# @socket: with the Linux store: the socket of the group's store daemon,
#     qemu-dedup-store, which keeps the store then.  @store-size and
#     @index-dir are not for it.  Only images that nobody writes to, on
#     ext4, XFS or btrfs, are shared.  (default: none; the QEMUs keep
#     the store themselves)
#
# Since: 10.0
##
{ 'struct': 'BlockdevOptionsDedupShare',
  'base': 'BlockdevOptionsGenericFormat',
  'data': { '*group': 'str',
            '*store': 'DedupShareStore',
            '*store-size': 'size',
            '*admission': 'DedupShareAdmission',
            '*index-dir': 'str',
            '*socket': 'str' },
  'if': 'CONFIG_DEDUP_SHARE' }

