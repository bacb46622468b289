/* The ring of the shared-memory wire: one producer, one consumer, in memory that two processes share.
 *
 * Sans-I/O: nothing here waits, calls the kernel or knows Python. Used by wires/_shm.pyx, and compiled alone by the tests
 * (ThreadSanitizer, a hostile peer). Layout and the argument for the doorbells: docs/design/shared-memory.md.
 *
 * Two parts. The *data* is written by the producer alone; the consumer maps it read-only. It is mapped twice, one copy
 * behind the other, so that a record which wraps around is contiguous all the same. The *control* page is written by both:
 * each cursor on a pair of cache lines of its own (128 bytes: the adjacent-line prefetcher fetches pairs), so that a side
 * that only advances its own cursor takes nothing from the other's cache. Each side keeps the other's cursor as it last saw
 * it and looks again only when that says "full" or "empty".
 *
 * What is read from shared memory is the peer's to change at any moment: each value is loaded once, checked, then used.
 *
 * After Lamport's single-producer queue ("Proving the Correctness of Multiprocess Programs", 1977), with cached cursors as
 * in FastForward/MCRingBuffer (Lee, Bu, Chandranmenon: "A lock-free, cache-efficient shared ring buffer", 2009).
 */
#ifndef ANYWIRE_RING_H
#define ANYWIRE_RING_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define AW_RING_MAGIC 0x31676e6972777961ull     /* "aywring1", little-endian */
#define AW_RING_VERSION 1u
#define AW_LINE 128                             /* bytes between what different sides write */
#define AW_RECORD 8                             /* bytes of a record's header; records are aligned to as many */
#define AW_RETURNS 512                          /* extents that may be on their way back; a power of two */
#define AW_PINS 256                             /* extents of a broadcast of mode latest that a consumer may have in hand */

typedef struct {
    /* Written once, before the peer maps it; `echo` by the peer: it proves that both see the same memory. */
    _Alignas(AW_LINE) uint64_t magic;
    uint32_t version;
    uint32_t flags;
    uint64_t nonce;
    _Atomic uint64_t echo;
    /* The producer's. */
    _Alignas(AW_LINE) _Atomic uint64_t head;    /* bytes published since the beginning */
    _Atomic uint64_t start;                     /* of a broadcast: where this consumer begins, 0 until it has joined */
    _Atomic uint32_t dropped;                   /* of a broadcast: nothing here is kept for this consumer any more */
    _Atomic uint64_t floor;                     /* of mode latest, as all that follows: records before this one may be
                                                   written over */
    _Atomic uint64_t oldest;                    /* where who is behind goes on */
    _Atomic uint64_t first;                     /* the number of the record at `start` */
    _Atomic uint64_t over;                      /* bytes of a message over this consumer's limit: it gets no more */
    /* The consumer's. */
    _Alignas(AW_LINE) _Atomic uint64_t tail;    /* bytes consumed since the beginning */
    _Atomic uint64_t taken;                     /* messages handed to the application */
    _Atomic uint64_t returned;                  /* extents given back since the beginning */
    _Atomic uint64_t lost;                      /* of mode latest: messages that it did not get since the beginning */
    _Atomic uint32_t pinned;                    /* of mode latest: only so many of `pins` were ever used */
    /* Doorbells: set by who is going to sleep, cleared by who rings. `closed`: the consumer takes no more messages. */
    _Alignas(AW_LINE) _Atomic uint32_t data_wanted;
    _Atomic uint32_t closed;
    _Alignas(AW_LINE) _Atomic uint32_t room_wanted;
    /* The extents given back: their first bytes' offsets in the pool, in units of AW_UNIT. */
    _Alignas(AW_LINE) _Atomic uint32_t returns[AW_RETURNS];
    /* Of mode latest: the extents that the consumer reads or has in hand, as in `returns`, plus 1; 0: none. */
    _Alignas(AW_LINE) _Atomic uint32_t pins[AW_PINS];
} aw_control;

typedef struct {
    char *data;                 /* mapped twice, `size` bytes each */
    aw_control *control;
    uint64_t size;              /* a power of two */
    uint64_t head;              /* written so far, perhaps not published yet */
    uint64_t published;
    uint64_t tail_seen;
    uint64_t returned_seen;
} aw_producer;

typedef struct {
    const char *data;
    aw_control *control;
    uint64_t size;
    uint64_t tail;
    uint64_t head_seen;
    uint64_t looked;            /* tail when it last looked whether the producer waits for room */
    uint64_t taken;
    uint64_t returned;
} aw_consumer;

typedef struct {
    uint32_t kind;
    uint32_t length;
    const char *data;
} aw_record;

static inline uint64_t aw_space(uint64_t length) {          /* bytes that a record occupies */
    return AW_RECORD + ((length + (AW_RECORD - 1)) & ~(uint64_t)(AW_RECORD - 1));
}

/* -- the producer --------------------------------------------------------------------------------------------------- */

/* Look at the consumer's cursor again. 0, or -1 when it makes no sense: it went back, or ahead of what was published. */
static inline int aw_see_tail(aw_producer *p) {
    /* Acquire, with the consumer's release store in aw_advance: its reads of the records before `tail` come before our
     * writes over them. */
    uint64_t tail = atomic_load_explicit(&p->control->tail, memory_order_acquire);
    if (tail - p->tail_seen > p->published - p->tail_seen || tail % AW_RECORD)
        return -1;
    p->tail_seen = tail;
    return 0;
}

/* Room for a record of `length` bytes (at most size / 2): 1, 0 when there is none now, -1 as aw_see_tail. */
static inline int aw_has_room(aw_producer *p, uint64_t length) {
    uint64_t need = aw_space(length);
    if (p->head + need - p->tail_seen <= p->size)
        return 1;
    if (aw_see_tail(p) < 0)
        return -1;
    return p->head + need - p->tail_seen <= p->size;
}

/* Where the bytes of the next record go; call after aw_has_room. */
static inline char *aw_slot(aw_producer *p) {
    return p->data + (p->head & (p->size - 1)) + AW_RECORD;
}

/* The record is written: give it its header. The consumer sees nothing of it until aw_publish. */
static inline void aw_commit(aw_producer *p, uint32_t kind, uint32_t length) {
    /* Relaxed: aw_publish orders it. Atomic so that the consumer's single load is one, whatever the compiler does. */
    atomic_store_explicit((_Atomic uint64_t *)(p->data + (p->head & (p->size - 1))), (uint64_t)kind << 32 | length,
                          memory_order_relaxed);
    p->head += aw_space(length);
}

/* Show the consumer everything committed: one store for any number of records. */
static inline void aw_publish(aw_producer *p) {
    /* Release, with the acquire load in aw_peek: the records' bytes are there before `head` says so. */
    atomic_store_explicit(&p->control->head, p->head, memory_order_release);
    p->published = p->head;
}

/* After aw_publish: whether the consumer sleeps and its doorbell must be rung (once). */
static inline int aw_must_ring(aw_producer *p) {
    /* The other half of aw_sleep_for_data: `head` must be visible before `data_wanted` is read, or both sides could miss
     * each other (Dekker). A release store alone does not order a later load, on x86 neither. */
    atomic_thread_fence(memory_order_seq_cst);
    /* Relaxed is enough: nothing is read on the strength of the flag but the flag. */
    if (!atomic_load_explicit(&p->control->data_wanted, memory_order_relaxed))
        return 0;
    /* An exchange, for the consumer may just set it again: who takes the 1 rings, and nobody rings twice for one sleep. */
    return atomic_exchange_explicit(&p->control->data_wanted, 0, memory_order_acq_rel) != 0;
}

/* Before sleeping until there is room for `length` bytes. Non-zero: do not sleep (1 there is room now, -1 nonsense). */
static inline int aw_sleep_for_room(aw_producer *p, uint64_t length) {
    atomic_store_explicit(&p->control->room_wanted, 1, memory_order_relaxed);
    /* With the fence in aw_room_was_wanted: either the consumer sees the flag, or we see its cursor. */
    atomic_thread_fence(memory_order_seq_cst);
    return aw_has_room(p, length);
}

static inline void aw_awake_with_room(aw_producer *p) {
    atomic_store_explicit(&p->control->room_wanted, 0, memory_order_relaxed);
}

/* The next extent that came back: 1 and its unit, 0 when none did, -1 when the cursor makes no sense. */
static inline int aw_next_return(aw_producer *p, uint32_t *unit) {
    /* Acquire, with the release store in aw_return: the consumer has read the extent before we write to it again. */
    uint64_t returned = atomic_load_explicit(&p->control->returned, memory_order_acquire);
    if (returned - p->returned_seen > AW_RETURNS)
        return -1;
    if (returned == p->returned_seen)
        return 0;
    *unit = atomic_load_explicit(&p->control->returns[p->returned_seen++ % AW_RETURNS], memory_order_relaxed);
    return 1;
}

/* -- the consumer --------------------------------------------------------------------------------------------------- */

/* Whether something is published that was not consumed: 1, 0, or -1 when the producer's cursor makes no sense. */
static inline int aw_has_data(aw_consumer *c) {
    uint64_t head;
    if (c->tail != c->head_seen)
        return 1;
    head = atomic_load_explicit(&c->control->head, memory_order_acquire);   /* see aw_publish */
    if (head == c->tail)
        return 0;
    if (head - c->tail > c->size || head % AW_RECORD)
        return -1;
    c->head_seen = head;
    return 1;
}

/* The oldest record: 1, 0 when there is none, -1 when what the producer wrote makes no sense. Its bytes may change under
 * our eyes if the producer breaks the rules; its place and length don't any more. */
static inline int aw_peek(aw_consumer *c, aw_record *record) {
    int here = aw_has_data(c);
    const char *at = c->data + (c->tail & (c->size - 1));
    uint64_t header;
    if (here <= 0)
        return here;
    header = atomic_load_explicit((const _Atomic uint64_t *)at, memory_order_relaxed);
    record->length = (uint32_t)header;
    record->kind = (uint32_t)(header >> 32);
    record->data = at + AW_RECORD;
    return aw_space(record->length) <= c->head_seen - c->tail ? 1 : -1;
}

/* Done with the oldest record; the producer is told by aw_release_records. */
static inline void aw_advance(aw_consumer *c, uint32_t length) {
    c->tail += aw_space(length);
}

/* The producer may overwrite what was consumed. */
static inline void aw_release_records(aw_consumer *c) {
    /* Release: our reads of the records come before the producer's writes over them (aw_see_tail). */
    atomic_store_explicit(&c->control->tail, c->tail, memory_order_release);
}

/* `count` more messages were handed to the application. */
static inline void aw_count_taken(aw_consumer *c, uint64_t count) {
    c->taken += count;
    /* Relaxed: a number that the producer reports, nothing hangs on it. */
    atomic_store_explicit(&c->control->taken, c->taken, memory_order_relaxed);
}

/* Whether a producer that sleeps for room must be rung. `now`: look even if little was consumed since the last look. The
 * fence is paid once a quarter of the ring, and whenever the ring is found empty: so a producer is woken at the latest when
 * nothing is left to consume, and earlier with enough room to be worth it. */
static inline int aw_room_was_wanted(aw_consumer *c, int now) {
    if (!now && c->tail - c->looked < c->size / 4)
        return 0;
    c->looked = c->tail;
    atomic_thread_fence(memory_order_seq_cst);          /* the other half of aw_sleep_for_room */
    if (!atomic_load_explicit(&c->control->room_wanted, memory_order_relaxed))
        return 0;
    return atomic_exchange_explicit(&c->control->room_wanted, 0, memory_order_acq_rel) != 0;
}

/* Before sleeping until something is published. Non-zero: do not sleep (1 there is data now, -1 nonsense). */
static inline int aw_sleep_for_data(aw_consumer *c) {
    atomic_store_explicit(&c->control->data_wanted, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);          /* the other half of aw_must_ring */
    return aw_has_data(c);
}

static inline void aw_awake_with_data(aw_consumer *c) {
    atomic_store_explicit(&c->control->data_wanted, 0, memory_order_relaxed);
}

/* Give an extent of the pool back. At most AW_RETURNS may be on their way: the producer never lends more. */
static inline void aw_return(aw_consumer *c, uint32_t unit) {
    atomic_store_explicit(&c->control->returns[c->returned++ % AW_RETURNS], unit, memory_order_relaxed);
    atomic_store_explicit(&c->control->returned, c->returned, memory_order_release);   /* see aw_next_return */
}

#endif
