# Lean device list for x86_64-softmmu: what the tests and the lab's guests use.
# Goes with --without-default-devices.
CONFIG_I440FX=y
CONFIG_Q35=y
CONFIG_XEN_EMU=y
CONFIG_ISA_DEBUG=y
CONFIG_TEST_DEVICES=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_SCSI=y
CONFIG_VIRTIO_BALLOON=y
CONFIG_NVME_PCI=y
CONFIG_VIRTIO_MEM=y
