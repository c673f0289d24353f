/*
 * qemu-dedup-store: what its clients and it say to each other
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The socket is of type SOCK_SEQPACKET: one packet is one message.  A message
 * is one of the structures below, followed by header.count entries where its
 * comment says so; it has exactly that size.  Numbers have the host's byte
 * order.  Reserved fields are 0.  A descriptor is passed with SCM_RIGHTS, and
 * only with the messages that say so.
 *
 * Who owns what
 *
 * - The store daemon owns the frames and all that is known of them.  A client
 *   gets a read-only descriptor of the frames' file (Linux), or the store
 *   domain's number and each frame's sharing handle (Xen).
 * - (slot, generation) names a content for ever.
 * - A *hold* keeps a frame from being evicted.  The daemon notes a client's
 *   hold of a frame before it sends an answer that names the frame.  The client
 *   lets go with DEDUP_MSG_RELEASE.  What it no longer holds it must neither
 *   map nor read.
 * - Holds belong to the client's process, not to the connection: when the
 *   connection ends, for whatever reason, they stay until the process that
 *   has connected is gone, or until it connects again and shows its token.
 * - A descriptor that is passed belongs to the receiver.
 *
 * What is said when
 *
 *   client                               daemon
 *   HELLO ------------------------------>
 *         <------------------------------ WELCOME, or REFUSED and the end
 *   LAYER (descriptor) ----------------->
 *         <------------------------------ LAYER_STATE, now and when it changes
 *   READ  ------------------------------>
 *         <------------------------------ ALIVE, while any block is being read
 *         <------------------------------ ANSWER
 *   PUT (bytes) ------------------------>
 *         <------------------------------ ANSWER
 *         <------------------------------ TRIM: what do you still map?
 *   RELEASE ---------------------------->
 *   CLAIM (descriptor) ----------------->
 *
 * A client may have many requests in flight.  They are answered in any order,
 * each of them once, when all of its blocks are decided.
 *
 * What a wrong message gets
 *
 * - A message of an unknown type, of another size, with a number out of range,
 *   a descriptor that was not asked for or is missing, out of turn, or with a
 *   request number that is not greater than that of the request before it: the
 *   daemon ends the connection, after a REFUSED that says why if that can be
 *   sent at once.  Holds stay, as above.
 * - A descriptor that cannot be used (not a regular file, not open for reading,
 *   O_PATH, a file system without leases): no error, the layer is not leased,
 *   and LAYER_STATE says why.
 * - More holds or requests than are permitted: no error; the answer is
 *   DEDUP_ANSWER_BUSY.  More layers: the layer's state is DEDUP_LAYER_LIMIT.
 * - A client that does not read what it is sent: the daemon reads no more of it
 *   until it does.
 *
 * A client checks in the same way what the daemon sends, and ends the
 * connection if anything is wrong.
 */

#ifndef DEDUP_STORE_PROTOCOL_H
#define DEDUP_STORE_PROTOCOL_H

#include <stdint.h>

/* HELLO and REFUSED never change; all else goes with the version. */
#define DEDUP_PROTOCOL_MAGIC   0x54534444u      /* "DDST" */
#define DEDUP_PROTOCOL_VERSION 1

/* Bytes of a block, and of a frame. */
#define DEDUP_PROTOCOL_BLOCK 4096

/* Blocks of a READ, of a PUT, slots of a RELEASE. */
#define DEDUP_READ_BLOCKS    256
#define DEDUP_PUT_BLOCKS     32
#define DEDUP_RELEASE_SLOTS  4096
/* Slots of a CLAIM. */
#define DEDUP_CLAIM_SLOTS    32768

/* Of one connection. */
#define DEDUP_LIMIT_LAYERS   256
#define DEDUP_LIMIT_REQUESTS 64

/* Milliseconds between two ALIVEs; a limit on silence is several of these. */
#define DEDUP_ALIVE_MS 250

/* No message is longer: PUT is the longest. */
#define DEDUP_MSG_MAX (64 + DEDUP_PUT_BLOCKS * DEDUP_PROTOCOL_BLOCK)

/* Bytes of a text, with the zero byte that ends it. */
#define DEDUP_TEXT_MAX 256

typedef enum DedupMsgType {
    /* client to daemon */
    DEDUP_MSG_HELLO = 1,        /* DedupMsgHello */
    DEDUP_MSG_LAYER = 2,        /* DedupMsgLayer, one descriptor */
    DEDUP_MSG_UNLAYER = 3,      /* DedupMsgLayer */
    DEDUP_MSG_READ = 4,         /* DedupMsgRead, DedupMsgExtent[count] */
    DEDUP_MSG_PUT = 5,          /* DedupMsgPut, count blocks */
    DEDUP_MSG_RELEASE = 6,      /* DedupMsgRelease, uint32_t slots[count] */
    DEDUP_MSG_ASK_STATUS = 7,   /* DedupMsgHeader */
    DEDUP_MSG_RECLAIM = 8,      /* DedupMsgHeader */
    /* DedupMsgClaim, uint32_t slots[count], one descriptor */
    DEDUP_MSG_CLAIM = 9,
    /* daemon to client */
    DEDUP_MSG_WELCOME = 65,     /* DedupMsgWelcome, one descriptor on Linux */
    DEDUP_MSG_REFUSED = 66,     /* DedupMsgRefused */
    DEDUP_MSG_LAYER_STATE = 67, /* DedupMsgLayerState */
    DEDUP_MSG_ANSWER = 68,      /* DedupMsgAnswer, DedupMsgFrame[count] */
    DEDUP_MSG_ALIVE = 69,       /* DedupMsgHeader */
    DEDUP_MSG_TRIM = 70,        /* DedupMsgHeader */
    DEDUP_MSG_STATUS = 71,      /* DedupMsgStatus, count bytes of text */
    /* DedupMsgHeader: count frames were dropped; for all RECLAIMs so far */
    DEDUP_MSG_RECLAIMED = 72,
} DedupMsgType;

typedef struct DedupMsgHeader {
    uint32_t type;
    uint32_t count;             /* entries that follow the structure, or 0 */
    /*
     * READ, PUT, ASK_STATUS, RECLAIM: a number that the client has not used
     * on this connection, greater than those before it; their answers have the
     * same.  Else 0.
     */
    uint64_t request;
} DedupMsgHeader;

/*
 * The first message of a client.  An observer, which only asks for the status
 * or reclaims, gets no descriptor and can say nothing else.
 */
#define DEDUP_HELLO_OBSERVER 1u
#define DEDUP_TOKEN_SIZE 16

typedef struct DedupMsgHello {
    DedupMsgHeader header;
    uint32_t magic;
    uint32_t version;
    uint32_t flags;
    uint32_t store;             /* DedupStoreKind wanted, or 0 for any */
    uint32_t domid;             /* Xen: the client's guest; not used yet */
    uint32_t reserved;
    /*
     * Zeroes, or the token of an earlier WELCOME: then this connection takes
     * over the holds of that one, which must have ended.
     */
    uint8_t token[DEDUP_TOKEN_SIZE];
} DedupMsgHello;

typedef enum DedupStoreKind {
    DEDUP_STORE_KIND_LINUX = 1,
    DEDUP_STORE_KIND_XEN = 2,
} DedupStoreKind;

/*
 * The client is in.  Linux: the descriptor is of the frames' file, read-only,
 * and of a description that no other client has; slot n is at n * 4096.  Xen:
 * slot n is a gfn of the domain @domid.
 */
typedef struct DedupMsgWelcome {
    DedupMsgHeader header;
    uint32_t version;
    uint32_t store;             /* DedupStoreKind */
    uint32_t nslots;            /* slots are smaller than this */
    uint32_t domid;             /* Xen: the store domain */
    uint64_t size;              /* bytes that the store may hold */
    uint64_t asked;             /* those that its --size says; 0: nothing */
    uint64_t lock;              /* Linux: the client's, see CLAIM */
    uint8_t token[DEDUP_TOKEN_SIZE];
    uint8_t uuid[16];           /* of this store: no other one has it */
} DedupMsgWelcome;

/* The connection ends. */
typedef struct DedupMsgRefused {
    DedupMsgHeader header;
    char text[DEDUP_TEXT_MAX];  /* an English sentence, for the log */
} DedupMsgRefused;

/*
 * LAYER: the client names an image file @layer, a number of its own that is not
 * in use, smaller than DEDUP_LIMIT_LAYERS.  The descriptor is of a description
 * that the client opened for this purpose, for reading; if that is O_DIRECT the
 * daemon reads the file so.
 *
 * UNLAYER: it is done with that number.  Requests in flight are answered.
 */
typedef struct DedupMsgLayer {
    DedupMsgHeader header;
    uint32_t layer;
    uint32_t reserved;
} DedupMsgLayer;

typedef enum DedupLayerState {
    DEDUP_LAYER_LEASED = 1,     /* READ may name it */
    DEDUP_LAYER_BROKEN = 2,     /* it was leased; somebody wants to write */
    DEDUP_LAYER_BUSY = 3,       /* somebody has it open for writing */
    DEDUP_LAYER_FORBIDDEN = 4,  /* the daemon may not read it, or lease it */
    DEDUP_LAYER_UNSUITABLE = 5, /* no regular file on ext4, XFS or btrfs */
    DEDUP_LAYER_SMALL = 6,      /* less than 1 MiB */
    DEDUP_LAYER_LIMIT = 7,      /* the client, or the daemon, has too many */
} DedupLayerState;

/*
 * LEASED: blocks of the layer may be read from now on.  All else: they may
 * not, for as long as the client has this number; blocks of it can be put.
 * BROKEN may follow LEASED at any time.
 */
typedef struct DedupMsgLayerState {
    DedupMsgHeader header;
    uint32_t layer;
    uint32_t state;             /* DedupLayerState */
    char text[DEDUP_TEXT_MAX];  /* why, for the log; may be empty */
} DedupMsgLayerState;

/* Blocks of READ: @n from @first on of @layer's file; not beyond its end. */
typedef struct DedupMsgExtent {
    uint32_t layer;
    uint32_t n;
    uint64_t first;
} DedupMsgExtent;

/* Only look; do not fill: for nodes whose reads are limited. */
#define DEDUP_REQUEST_NO_FILL 1u
/* New content enters the store when it is seen for the second time. */
#define DEDUP_REQUEST_SECOND_READ 2u

/*
 * What holds these blocks?  At least one extent, at most DEDUP_READ_BLOCKS
 * blocks in all.  The answer has the blocks in the order of the extents.
 */
typedef struct DedupMsgRead {
    DedupMsgHeader header;
    uint32_t flags;             /* DEDUP_REQUEST_* */
    uint32_t reserved;
} DedupMsgRead;

/* The client has read these blocks: find or make frames of their content. */
typedef struct DedupMsgPut {
    DedupMsgHeader header;
    uint32_t flags;             /* DEDUP_REQUEST_* */
    uint32_t reserved;
} DedupMsgPut;

typedef enum DedupAnswer {
    DEDUP_ANSWER_FRAME = 1,     /* it is in the frame named, which is held */
    DEDUP_ANSWER_ZEROES = 2,    /* it is all zeroes, and in no frame */
    DEDUP_ANSWER_ABSENT = 3,    /* with NO_FILL: not there */
    DEDUP_ANSWER_SEEN_ONCE = 4, /* with SECOND_READ: not admitted yet */
    DEDUP_ANSWER_NO_LEASE = 5,  /* the layer is not leased, or not any more */
    DEDUP_ANSWER_FULL = 6,      /* no frame is free, and none is idle */
    DEDUP_ANSWER_FAILED = 7,    /* reading or storing it failed */
    DEDUP_ANSWER_BUSY = 8,      /* the client has too much of something */
} DedupAnswer;

/* READ: it was not known, and had to be read from the image. */
#define DEDUP_FRAME_FILLED 1u
/* FRAME: it was made for this request; no frame had this content. */
#define DEDUP_FRAME_NEW 2u

typedef struct DedupMsgFrame {
    uint32_t answer;            /* DedupAnswer */
    uint32_t slot;              /* FRAME, else 0 */
    uint32_t generation;        /* FRAME, else 0 */
    uint32_t flags;             /* DEDUP_FRAME_* */
    uint64_t handle;            /* FRAME on Xen, else 0 */
} DedupMsgFrame;

/* What became of the header.count blocks of a request, of all of them. */
typedef struct DedupMsgAnswer {
    DedupMsgHeader header;
    uint64_t serial;            /* counts the answers to the client's process */
} DedupMsgAnswer;

/*
 * The client no longer uses these frames, as far as it knows from answers up to
 * @serial.  A frame that a later answer has named stays held, and one that the
 * client does not hold is left out.  No answer.
 */
typedef struct DedupMsgRelease {
    DedupMsgHeader header;
    uint64_t serial;
} DedupMsgRelease;

/*
 * Linux: what the client's guest may still map of the frames of a daemon that
 * has ended; the descriptor is that of their file, of that daemon's WELCOME.
 * All slots are named, in as many messages as that takes, on one connection,
 * the first and the last of which are marked; they replace what was claimed
 * before.  To be said when the client is connected to the next daemon, and
 * after each TRIM.  No answer.
 *
 * A client has a read lock on the file's byte DedupMsgWelcome.lock, by the
 * description that was passed to it.  Until that ends, or is given up by who
 * uses nothing of the file any more, nothing is punched that it has not left
 * out of a claim.
 */
#define DEDUP_CLAIM_FIRST 1u
#define DEDUP_CLAIM_LAST 2u

typedef struct DedupMsgClaim {
    DedupMsgHeader header;
    uint32_t flags;             /* DEDUP_CLAIM_* */
    uint32_t reserved;
    uint64_t lock;              /* of that WELCOME */
} DedupMsgClaim;

/* A part of a JSON text: DedupStoreStatus of the QAPI schema. */
#define DEDUP_STATUS_MORE 1u

typedef struct DedupMsgStatus {
    DedupMsgHeader header;
    uint32_t flags;
    uint32_t reserved;
} DedupMsgStatus;

#endif /* DEDUP_STORE_PROTOCOL_H */
