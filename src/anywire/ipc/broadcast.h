/* One producer, several consumers: what a broadcast adds to the ring of ring.h.
 *
 * All consumers map the same data; each has a control page of its own, so to a consumer it is the ring that it knows. The
 * producer keeps one aw_producer for each, all of the same data, and writes each record once. It shows it by storing `head`
 * in every control page, and then fences once for all of them.
 *
 * A consumer that the producer waits for no longer is *dropped*: its records are written over while it may be reading them.
 * So a consumer looks whether it was dropped after it copied, and before it hands out.
 *
 * Sans-I/O, as ring.h. Used by wires/_shm_broadcast.pyx.
 */
#ifndef ANYWIRE_BROADCAST_H
#define ANYWIRE_BROADCAST_H

#include "anywire/ipc/ring.h"

/* -- the producer --------------------------------------------------------------------------------------------------- */

/* A consumer that has mapped all this, and not begun to read, begins at `at`. Call aw_publish next. */
static inline void aw_let_begin(aw_producer *p, uint64_t at) {
    p->head = p->published = p->tail_seen = at;
    /* Relaxed: the consumer stores `tail` itself too, and until then it is what the producer believes. */
    atomic_store_explicit(&p->control->tail, at, memory_order_relaxed);
    /* Release, with the acquire load in aw_start: whoever sees `start` sees `tail`. */
    atomic_store_explicit(&p->control->start, at, memory_order_release);
}

/* Between aw_publish for all consumers and aw_was_asleep for each: as the fence in aw_must_ring, once for all. It also
 * stands between aw_drop and the look at what the dropped one has read: see aw_still_kept. */
static inline void aw_fence(void) {
    atomic_thread_fence(memory_order_seq_cst);
}

/* After aw_fence: whether this consumer sleeps and must be rung. The rest of aw_must_ring. */
static inline int aw_was_asleep(aw_producer *p) {
    if (!atomic_load_explicit(&p->control->data_wanted, memory_order_relaxed))
        return 0;
    return atomic_exchange_explicit(&p->control->data_wanted, 0, memory_order_acq_rel) != 0;
}

/* Before aw_fence and another look at the cursors: as in aw_sleep_for_room. */
static inline void aw_want_room(aw_producer *p) {
    atomic_store_explicit(&p->control->room_wanted, 1, memory_order_relaxed);
}

/* Nothing is kept for this consumer any more. aw_fence must come before the first write over its records. */
static inline void aw_drop(aw_producer *p, uint32_t why) {
    /* Relaxed: the fence orders it before all that is written later. */
    atomic_store_explicit(&p->control->dropped, why, memory_order_relaxed);
}

/* -- the consumer --------------------------------------------------------------------------------------------------- */

/* Where to begin, 0: it has not joined yet. */
static inline uint64_t aw_start(aw_consumer *c) {
    return atomic_load_explicit(&c->control->start, memory_order_acquire);      /* see aw_let_begin */
}

static inline void aw_begin(aw_consumer *c, uint64_t at) {
    c->tail = c->head_seen = c->looked = at;
}

/* After copying: 0, or why what was copied may be torn. */
static inline uint32_t aw_dropped(aw_consumer *c) {
    /* Acquire, with aw_fence after aw_drop: if one byte that we copied was written after the drop, we see the drop. */
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&c->control->dropped, memory_order_relaxed);
}

/* After aw_release_records, and before memory that such a record refers to is handed out: 0, or why it must not be. */
static inline uint32_t aw_still_kept(aw_consumer *c) {
    /* With aw_fence after aw_drop: either we see the drop, or the producer sees in `tail` that we have this memory. */
    atomic_thread_fence(memory_order_seq_cst);
    return atomic_load_explicit(&c->control->dropped, memory_order_relaxed);
}

#endif
