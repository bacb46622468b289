/* One producer that waits for nobody, several consumers: what mode latest of a broadcast adds to broadcast.h.
 *
 * The producer writes over the oldest records whether or not anybody has read them. Before it does, it raises `floor` in
 * every control page: records before it are not to be believed. A consumer copies a record and then looks at `floor`, as
 * the reader of a sequence lock does (Boehm, "Can seqlocks get along with programming language memory models?", 2012); all
 * that is read under such a doubt is read and written by atomic words, so that there is no data race in C's sense either.
 *
 * Memory of the pool that a consumer reads, or has in hand, it *pins*: it writes the extent's place to `pins`, fences, and
 * then looks at `floor`. The producer raises `floor`, fences, and then looks at `pins` before it uses an extent again
 * (hazard pointers: Michael, "Hazard Pointers: Safe Memory Reclamation for Lock-Free Objects", 2004).
 *
 * Each record begins with its number, from which a consumer knows how many it lost. Sans-I/O, as ring.h. Used by
 * wires/_shm_latest.pyx.
 */
#ifndef ANYWIRE_LATEST_H
#define ANYWIRE_LATEST_H

#include "anywire/ipc/broadcast.h"

#define AW_NUMBER 8                             /* bytes of a record's number, behind its header */

/* Both of multiples of 8 bytes; `n` is rounded up. */
static inline void aw_put_words(char *to, const char *from, uint64_t n) {
    uint64_t word;
    /* Relaxed: who believes them has seen `head`, or that `floor` is not past them. */
    for (; n >= 8; n -= 8, to += 8, from += 8) {
        memcpy(&word, from, 8);
        atomic_store_explicit((_Atomic uint64_t *)to, word, memory_order_relaxed);
    }
    if (n) {
        word = 0;
        memcpy(&word, from, n);
        atomic_store_explicit((_Atomic uint64_t *)to, word, memory_order_relaxed);
    }
}

static inline void aw_get_words(char *to, const char *from, uint64_t n) {
    uint64_t word;
    for (; n >= 8; n -= 8, to += 8, from += 8) {
        word = atomic_load_explicit((const _Atomic uint64_t *)from, memory_order_relaxed);
        memcpy(to, &word, 8);
    }
    if (n) {
        word = atomic_load_explicit((const _Atomic uint64_t *)from, memory_order_relaxed);
        memcpy(to, &word, n);
    }
}

/* -- the producer --------------------------------------------------------------------------------------------------- */

/* Call before aw_let_begin: this consumer begins at `at`, with the record of this number. */
static inline void aw_let_begin_latest(aw_producer *p, uint64_t at, uint64_t number) {
    /* Relaxed: aw_let_begin's release store of `start` orders them. */
    atomic_store_explicit(&p->control->first, number, memory_order_relaxed);
    atomic_store_explicit(&p->control->floor, at, memory_order_relaxed);
    atomic_store_explicit(&p->control->oldest, at, memory_order_relaxed);
}

/* What lies before `floor` is about to be written over. For each consumer, then aw_fence once, then write. */
static inline void aw_raise_floor(aw_producer *p, uint64_t floor) {
    /* Release, with the acquire load in aw_latest_look: who sees it sees a `head` that is not before it. That it comes
     * before the writing is aw_fence's doing. */
    atomic_store_explicit(&p->control->floor, floor, memory_order_release);
}

/* A record of `length` bytes, its number among them, at `head`: the words behind its number come from `from`. */
static inline void aw_commit_latest(aw_producer *p, uint32_t kind, uint64_t number, const char *from, uint64_t length) {
    char *slot = aw_slot(p);
    aw_put_words(slot, (const char *)&number, AW_NUMBER);
    aw_put_words(slot + AW_NUMBER, from, length - AW_NUMBER);
    aw_commit(p, kind, (uint32_t)length);
}

/* Show this consumer all that was committed; who is behind goes on at `oldest`. */
static inline void aw_publish_latest(aw_producer *p, uint64_t oldest) {
    aw_publish(p);
    /* Release, with the acquire load in aw_latest_look: as for `floor`. */
    atomic_store_explicit(&p->control->oldest, oldest, memory_order_release);
}

/* A message over this consumer's limit went, of so many bytes: it is shown nothing any more. Then ring. */
static inline void aw_tell_over(aw_producer *p, uint64_t nbytes) {
    atomic_store_explicit(&p->control->over, nbytes, memory_order_release);
}

/* After aw_fence: how many pins to look at, and the unit that one of them holds, plus 1; 0: none. */
static inline uint32_t aw_pins_used(aw_producer *p) {
    uint32_t used = atomic_load_explicit(&p->control->pinned, memory_order_relaxed);   /* the fences order it */
    return used < AW_PINS ? used : AW_PINS;
}

static inline uint32_t aw_pin_of(aw_producer *p, uint32_t pin) {
    /* Acquire, with the release store in aw_unpin: the consumer has read the extent before we write to it again. */
    return atomic_load_explicit(&p->control->pins[pin], memory_order_acquire);
}

static inline uint64_t aw_lost_by(aw_producer *p) {
    return atomic_load_explicit(&p->control->lost, memory_order_relaxed);              /* a number to report */
}

static inline uint64_t aw_tail_of(aw_producer *p) {
    return atomic_load_explicit(&p->control->tail, memory_order_relaxed);              /* a number to report */
}

/* -- the consumer --------------------------------------------------------------------------------------------------- */

/* What is there? 1: a record at c->tail, 0: none, -1: the producer's cursors make no sense. Goes on where who is behind
 * does. */
static inline int aw_latest_look(aw_consumer *c) {
    /* These two before `head`: then `head` is not before them. */
    uint64_t oldest = atomic_load_explicit(&c->control->oldest, memory_order_acquire);
    uint64_t floor = atomic_load_explicit(&c->control->floor, memory_order_acquire);
    uint64_t head = atomic_load_explicit(&c->control->head, memory_order_acquire);     /* see aw_publish */
    if (floor > oldest)                         /* the producer is just making room, or was stopped in the middle of it */
        oldest = floor;
    if (head % AW_RECORD || oldest % AW_RECORD || oldest > head || head < c->tail)
        return -1;
    if (oldest > c->tail)
        c->tail = oldest;
    c->head_seen = head;
    return head != c->tail;
}

/* The record at c->tail, after aw_latest_look: 1, or -1 when it makes no sense, which it may when it was written over. Its
 * words, too, are to be believed only if aw_latest_valid says so afterwards. */
static inline int aw_latest_peek(aw_consumer *c, aw_record *record, uint64_t *number) {
    const char *at = c->data + (c->tail & (c->size - 1));
    uint64_t header = atomic_load_explicit((const _Atomic uint64_t *)at, memory_order_relaxed);
    uint64_t left = c->head_seen - c->tail;
    record->length = (uint32_t)header;
    record->kind = (uint32_t)(header >> 32);
    record->data = at + AW_RECORD + AW_NUMBER;
    if (record->length < AW_NUMBER || record->length > c->size / 2 || aw_space(record->length) > left)
        return -1;
    *number = atomic_load_explicit((const _Atomic uint64_t *)(at + AW_RECORD), memory_order_relaxed);
    return 1;
}

/* After reading the record at `at`, and all behind it: whether that is what was written there. */
static inline int aw_latest_valid(aw_consumer *c, uint64_t at) {
    /* Acquire, with the producer's fence after aw_raise_floor: if one word that we read was written after that fence, we
     * see the floor that came before it. */
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&c->control->floor, memory_order_relaxed) <= at
        && !atomic_load_explicit(&c->control->dropped, memory_order_relaxed);
}

/* Keep the extent at this unit from being used again, if aw_latest_valid says afterwards that its record still counts. */
static inline void aw_pin(aw_consumer *c, uint32_t pin, uint32_t unit) {
    atomic_store_explicit(&c->control->pins[pin], unit + 1, memory_order_relaxed);
    if (pin >= atomic_load_explicit(&c->control->pinned, memory_order_relaxed))
        atomic_store_explicit(&c->control->pinned, pin + 1, memory_order_relaxed);
    /* With aw_fence after aw_raise_floor: either we see the floor, or the producer sees the pin. */
    atomic_thread_fence(memory_order_seq_cst);
}

static inline void aw_unpin(aw_consumer *c, uint32_t pin) {
    /* Release: our reads of the extent come before the producer's writes over it (aw_pin_of). */
    atomic_store_explicit(&c->control->pins[pin], 0, memory_order_release);
}

static inline uint64_t aw_first(aw_consumer *c) {
    return atomic_load_explicit(&c->control->first, memory_order_relaxed);             /* after aw_start's acquire */
}

static inline uint64_t aw_over(aw_consumer *c) {
    return atomic_load_explicit(&c->control->over, memory_order_acquire);
}

static inline void aw_tell_lost(aw_consumer *c, uint64_t count) {
    uint64_t lost = atomic_load_explicit(&c->control->lost, memory_order_relaxed);
    atomic_store_explicit(&c->control->lost, lost + count, memory_order_relaxed);
}

#endif
