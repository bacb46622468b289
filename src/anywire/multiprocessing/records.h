/* Messages of many writers to many readers through one ring in shared memory, any of whom may be killed at any instant.
 *
 * The ring is a memfd: a page with the words below, then the data, mapped twice back to back so that a record never
 * wraps. `head` and `tail` only grow; a record lies at data + (position & mask), 8-aligned: u32 length, u8 piece,
 * u8 content, u16 parts, then the bytes. Three robust locks (robust.h), each in the order turn, take, put:
 *
 *   put    writers. A record is copied in and `head` is moved last: who dies before has delivered nothing.
 *   take   readers. A record is copied out and `tail` is moved last: who dies before has taken nothing.
 *   turn   the one reader that sleeps on the doorbell. The others sleep on this lock, so a message wakes one of them,
 *          and when that one dies the kernel wakes the next.
 *
 * A message longer than a quarter of the ring goes in pieces under the writer's lock. `writing` tells the writer's heir
 * to end it with an ABANDONED record, upon which readers drop what they have; `skipping` tells the reader's heir to
 * skip what is left of a message. Counters are written with an intent before and the position in between, so that an
 * heir finds out whether the death was before or after.
 *
 * Memory orders. Under a lock, plain accesses: its acquire and release order them. `head` is stored with release,
 * loaded with acquire: it hands the record over between the two locks. `tail` likewise hands the space back. Who
 * sleeps announces it (looking, mid_waiting, space_waiting, slot_waiting, joiners), then a full fence, then looks
 * again; who publishes stores, then a full fence, then reads the announcement (Dekker): one of the two sees the
 * other. All else is a hint that is read again under a lock, hence relaxed.
 *
 * What is read from the ring is checked before use: MP_CORRUPT, not a crash.
 */
#ifndef ANYWIRE_MULTIPROCESSING_RECORDS_H
#define ANYWIRE_MULTIPROCESSING_RECORDS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include "robust.h"

#define MP_MAGIC UINT64_C(0x3170726957796e41)
#define MP_SLOTS 24
#define MP_LINE __attribute__((aligned(64)))

enum { MP_WHOLE = 0, MP_FIRST, MP_MORE, MP_LAST, MP_ABANDONED };

/* A feeder thread of a process whose queue outgrew the ring holds `lock` while it lives; `count` messages wait. */
typedef struct {
    mp_lock lock;
    uint64_t count MP_LINE;
} mp_slot;

typedef struct {
    uint64_t magic, size;
    int64_t futex_offset;
    mp_lock put MP_LINE;
    uint64_t head MP_LINE;
    uint64_t intent_head MP_LINE;       /* from here on the writers' own, under `put` */
    uint64_t intent_count, put_count, seen_tail;
    uint32_t writing, backlogs;
    mp_lock take MP_LINE;
    uint64_t tail MP_LINE;
    uint64_t intent_tail MP_LINE;       /* the readers' own, under `take` */
    uint64_t intent_got, got_count, seen_head;
    uint32_t skipping;
    mp_lock turn MP_LINE;
    uint32_t looking MP_LINE;           /* a reader spins: the next message needs no doorbell */
    uint32_t external;                  /* somebody watches the doorbell: it must always tell the truth */
    uint32_t token;                     /* a byte lies in the doorbell; under `put` */
    uint32_t closes;                    /* how often a reading end was closed: a writer looks whether it was the last */
    uint32_t holder;                    /* a process that keeps the others from reading, or 0 */
    uint32_t space_waiting MP_LINE;
    uint32_t space_turn, slot_waiting, slot_turn, mid_waiting, mid_turn;
    uint64_t done MP_LINE;              /* task_done() calls */
    uint32_t done_turn, joiners;
    mp_slot slots[MP_SLOTS];
} mp_shared;

_Static_assert(sizeof(mp_lock) == 64, "a lock is a cache line");
_Static_assert(sizeof(mp_shared) <= 4096, "the words fit into the first page");

typedef struct {
    mp_shared *s;
    unsigned char *data;
    uint64_t size, mask;
    int most_spin;                      /* nanoseconds a reader looks before it sleeps; 0 on one CPU */
    int vain, waits;                    /* how often that was in vain since it paid last; how often it was left out */
    int lock_spins;
} mp_ring;

typedef struct {
    uint32_t length;
    uint8_t piece, content;
    uint16_t parts;
} mp_record;

typedef struct {
    void *base;
    size_t length;
} mp_part;

/* A message on its way in or out, and how far it has come. */
typedef struct {
    mp_part *parts;
    int count, at;
    size_t offset;
    uint64_t total, left;
    int content, buffers, middle;
    mp_slot *slot;
} mp_message;

#define MP_RESERVE 64                   /* room that only an ABANDONED record may use */

#define MP_LOAD(word) __atomic_load_n(&(word), __ATOMIC_RELAXED)
#define MP_STORE(word, value) __atomic_store_n(&(word), value, __ATOMIC_RELAXED)
#define MP_FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)

static inline uint64_t mp_span(uint64_t length)
{
    return sizeof(mp_record) + ((length + 7) & ~UINT64_C(7));
}

static inline uint64_t mp_piece(const mp_ring *r)
{
    return r->size / 8;
}

static inline int mp_empty(const mp_ring *r)
{
    return __atomic_load_n(&r->s->head, __ATOMIC_ACQUIRE) == MP_LOAD(r->s->tail);
}

/* ---- copying ---------------------------------------------------------------------------------------------------- */

static inline void mp_rewind(mp_message *m)
{
    m->at = 0;
    m->offset = 0;
    m->left = m->total;
    m->middle = 0;
}

/* Copy `n` bytes between the ring and the parts; the caller has checked that they hold so many. */
static inline void mp_copy(mp_message *m, unsigned char *ring, uint64_t n, int out)
{
    m->left -= n;
    while (n) {
        mp_part *part = &m->parts[m->at];
        uint64_t some = part->length - m->offset;
        if (some > n)
            some = n;
        if (some) {
            if (out)
                memcpy((char *)part->base + m->offset, ring, some);
            else
                memcpy(ring, (char *)part->base + m->offset, some);
        }
        ring += some;
        n -= some;
        m->offset += some;
        if (m->offset == part->length && m->at < m->count - 1) {
            m->at++;
            m->offset = 0;
        }
    }
}

/* ---- locks and what their heirs repair -------------------------------------------------------------------------- */

static inline void mp_append(mp_ring *r, uint64_t head, uint32_t length, int piece, int content, int parts)
{
    mp_record *record = (mp_record *)(r->data + (head & r->mask));
    record->length = length;
    record->piece = (uint8_t)piece;
    record->content = (uint8_t)content;
    record->parts = (uint16_t)parts;
}

static void mp_abandon(mp_ring *r)
{
    mp_shared *s = r->s;
    uint64_t head = s->head;
    mp_append(r, head, 0, MP_ABANDONED, 0, 0);
    __atomic_store_n(&s->head, head + sizeof(mp_record), __ATOMIC_RELEASE);
    s->writing = 0;
    MP_FENCE();
    if (__atomic_exchange_n(&s->mid_waiting, 0, __ATOMIC_RELAXED)) {
        __atomic_fetch_add(&s->mid_turn, 1, __ATOMIC_RELAXED);
        mp_futex_wake(&s->mid_turn, 1);
    }
}

static void mp_put_repair(mp_ring *r)
{
    mp_shared *s = r->s;
    if (s->intent_head == s->head)
        MP_STORE(s->put_count, s->intent_count);
    if (s->writing)
        mp_abandon(r);
}

static void mp_take_repair(mp_ring *r)
{
    mp_shared *s = r->s;
    if (s->intent_tail == s->tail)
        MP_STORE(s->got_count, s->intent_got);
}

static inline int mp_lock_put(mp_ring *r, int64_t deadline)
{
    int result = deadline ? mp_acquire(&r->s->put, deadline, r->lock_spins) : mp_try(&r->s->put, 0);
    if (__builtin_expect(result == MP_DIED, 0)) {
        mp_put_repair(r);
        result = MP_OK;
    }
    return result;
}

static inline int mp_lock_take(mp_ring *r, int64_t deadline)
{
    int result = deadline ? mp_acquire(&r->s->take, deadline, r->lock_spins) : mp_try(&r->s->take, 0);
    if (__builtin_expect(result == MP_DIED, 0)) {
        mp_take_repair(r);
        result = MP_OK;
    }
    return result;
}

/* Inherit what a dead owner left, where nobody else may come to do it. */
static void mp_heal(mp_ring *r)
{
    if (mp_orphan(&r->s->put) && mp_lock_put(r, 0) == MP_OK)
        mp_release(&r->s->put);
    if (mp_orphan(&r->s->take) && mp_lock_take(r, 0) == MP_OK)
        mp_release(&r->s->take);
}

/* ---- counting --------------------------------------------------------------------------------------------------- */

static uint64_t mp_backlog(mp_shared *s)
{
    uint64_t sum = 0;
    uint32_t n = MP_LOAD(s->backlogs);
    if (n > MP_SLOTS)
        n = MP_SLOTS;
    for (uint32_t i = 0; i < n; i++)    /* the kernel marks the slot of a feeder that died: its messages are gone */
        if (mp_taken(&s->slots[i].lock))
            sum += MP_LOAD(s->slots[i].count);
    return sum;
}

/* Messages put and not taken, with those that wait in feeders. Exact under both locks, else a moment's view. */
static uint64_t mp_items(mp_shared *s)
{
    int64_t here = (int64_t)(MP_LOAD(s->put_count) - MP_LOAD(s->got_count));
    return (uint64_t)(here > 0 ? here : 0) + mp_backlog(s);
}

/* ---- the doorbell ----------------------------------------------------------------------------------------------- */

/* A socket pair whose receiving end is readable while there is something to read: one byte lies in it then, and `token`
 * says so. Only the one message that a spinning reader is about to take has none. Its end-of-file is the end of all
 * writers.
 *
 * After publishing, under `put`: wake who sleeps. MP_ENDED when nobody is left to read. */
static inline int mp_ring_bell(mp_ring *r, int bell)
{
    mp_shared *s = r->s;
    MP_FENCE();
    if (__builtin_expect(MP_LOAD(s->mid_waiting), 0) &&
        __atomic_exchange_n(&s->mid_waiting, 0, __ATOMIC_RELAXED)) {
        __atomic_fetch_add(&s->mid_turn, 1, __ATOMIC_RELAXED);
        mp_futex_wake(&s->mid_turn, 1);
    }
    if (!s->token &&
        (MP_LOAD(s->external) || !MP_LOAD(s->looking) || !__atomic_exchange_n(&s->looking, 0, __ATOMIC_RELAXED))) {
        /* First the byte, then the word: who dies in between leaves a byte too many, never one too few. */
        if (send(bell, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && (errno == EPIPE || errno == ECONNRESET))
            return MP_ENDED;
        MP_STORE(s->token, 1);
    }
    return MP_OK;
}

/* One byte, and no more: others may use the socket, as multiprocessing.reduction does to hand descriptors over. */
static void mp_drain(int bell)
{
    char byte;
    while (recv(bell, &byte, 1, MSG_DONTWAIT) < 0 && errno == EINTR)
        ;
}

/* The ring is empty, so the doorbell must be. With `take` or `turn` held. Where its descriptor is watched it must be
 * done now; else it is put off (beyond `deadline`) while a writer is at work: the byte costs its reader one look. */
static void mp_quiet(mp_ring *r, int bell, int64_t deadline)
{
    mp_shared *s = r->s;
    int result = mp_lock_put(r, deadline);
    /* Never wait for a writer that waits for us: once there is something in the ring, the byte is right. */
    while ((result == MP_BUSY || result == MP_TIMEDOUT || result == MP_INTERRUPTED) && MP_LOAD(s->external) &&
           mp_empty(r))
        result = mp_lock_put(r, mp_now() + 2000000);
    if (result != MP_OK)
        return;
    if (s->head == MP_LOAD(s->tail) && s->token) {
        MP_STORE(s->token, 0);          /* first the word, as mp_ring_bell does it last */
        mp_drain(bell);
    }
    mp_release(&s->put);
}

/* From now on the doorbell tells of each message. */
static int mp_watch(mp_ring *r, int bell)
{
    mp_shared *s = r->s;
    int result;
    MP_STORE(s->external, 1);
    do {
        result = mp_lock_put(r, mp_now() + 2000000);
        if (result == MP_TIMEDOUT && !mp_empty(r))
            return MP_OK;
    } while (result == MP_TIMEDOUT || result == MP_INTERRUPTED);
    if (result != MP_OK)
        return result;
    if (s->head == MP_LOAD(s->tail) && s->token) {
        MP_STORE(s->token, 0);          /* first the word, as mp_ring_bell does it last */
        mp_drain(bell);
    }
    mp_release(&s->put);
    return MP_OK;
}

/* Whether all copies of the doorbell's other end are closed. */
static inline int mp_gone(int bell)
{
    struct pollfd p = {bell, POLLRDHUP, 0};
    return poll(&p, 1, 0) > 0;
}

/* ---- writing ---------------------------------------------------------------------------------------------------- */

static inline int mp_room(mp_ring *r, uint64_t need)
{
    mp_shared *s = r->s;
    uint64_t limit = r->size - MP_RESERVE;
    if (s->head - s->seen_tail + need <= limit)
        return 1;
    s->seen_tail = __atomic_load_n(&s->tail, __ATOMIC_ACQUIRE);
    return s->head - s->seen_tail + need <= limit;
}

static inline int64_t mp_slice(int64_t deadline, int64_t length)
{
    int64_t slice = mp_now() + length;
    return slice < deadline ? slice : deadline;
}

/* Wait until `need` bytes are free. Readers wake writers when half of the ring is free; a slice of time, in case the
 * one who should wake us died, or frees less than half. MP_OK: look again. */
static int mp_wait_space(mp_ring *r, uint64_t need, int bell, int64_t deadline)
{
    mp_shared *s = r->s;
    uint64_t limit = r->size - MP_RESERVE;
    int64_t until, now = mp_now();
    uint32_t turn;
    int error;
    if (r->most_spin) {
        until = now + r->most_spin;
        while (mp_now() < until) {
            for (int i = 0; i < 20; i++)
                mp_pause();
            if (MP_LOAD(s->head) - MP_LOAD(s->tail) + need <= limit)
                return MP_OK;
        }
    }
    turn = MP_LOAD(s->space_turn);
    MP_STORE(s->space_waiting, 1);
    MP_FENCE();
    if (MP_LOAD(s->head) - MP_LOAD(s->tail) + need <= limit)
        return MP_OK;
    if (mp_gone(bell))
        return MP_ENDED;
    error = mp_futex_wait(&s->space_turn, turn, mp_slice(deadline, 20000000));
    if (error == EINTR)
        return MP_INTERRUPTED;
    mp_heal(r);
    if (error != ETIMEDOUT)
        return MP_OK;
    /* A signal may have come just before the sleep began: each slice gives its handler a chance. */
    return deadline == MP_FOREVER ? MP_INTERRUPTED : mp_now() >= deadline ? MP_TIMEDOUT : MP_OK;
}

/* The same for a feeder, which has no signals: until there is room, or `deadline`. */
static int mp_wait_room(mp_ring *r, uint64_t need, int bell, int64_t deadline)
{
    int result = MP_OK;
    while ((result == MP_OK || result == MP_INTERRUPTED) &&
           MP_LOAD(r->s->head) - MP_LOAD(r->s->tail) + need > r->size - MP_RESERVE)
        result = mp_wait_space(r, need, bell, deadline);
    return result;
}

static int mp_wait_slot(mp_ring *r, uint64_t most, int bell, int64_t deadline)
{
    mp_shared *s = r->s;
    uint32_t turn = MP_LOAD(s->slot_turn);
    int error;
    __atomic_fetch_add(&s->slot_waiting, 1, __ATOMIC_RELAXED);
    MP_FENCE();
    error = EAGAIN;
    if (mp_items(s) >= most)
        error = mp_futex_wait(&s->slot_turn, turn, mp_slice(deadline, 100000000));
    __atomic_fetch_sub(&s->slot_waiting, 1, __ATOMIC_RELAXED);
    if (error == EINTR)
        return MP_INTERRUPTED;
    mp_heal(r);
    if (mp_gone(bell))
        return MP_ENDED;
    return error == ETIMEDOUT && deadline != MP_FOREVER && mp_now() >= deadline ? MP_TIMEDOUT : MP_OK;
}

/* The record at `head` is complete; with `last` it completes a message. */
static inline void mp_publish(mp_ring *r, mp_message *m, uint64_t head, int last)
{
    mp_shared *s = r->s;
    if (last) {
        s->intent_count = s->put_count + 1;
        s->intent_head = head;
        if (m->slot != NULL)
            __atomic_fetch_sub(&m->slot->count, 1, __ATOMIC_RELAXED);
    }
    __atomic_store_n(&s->head, head, __ATOMIC_RELEASE);
    if (last)
        MP_STORE(s->put_count, s->intent_count);
}

/* Put a message. `patience`: nanoseconds to wait for the lock, and for room each time; 0: not at all. `most`: how many
 * messages there may be, or 0.
 * MP_OK; MP_BUSY: no room in time; MP_TIMEDOUT: `most` are there; MP_ENDED: no reader is left.
 * MP_INTERRUPTED: a signal; call again with the same message. Then m->middle says that it holds the lock, and who
 * doesn't call again must call mp_put_cancel. */
static int mp_put(mp_ring *r, mp_message *m, int bell, uint64_t most, int64_t patience)
{
    mp_shared *s = r->s;
    uint64_t span, n, first;
    int64_t deadline;
    int result;
#define MP_DEADLINE (patience == 0 ? 0 : patience == MP_FOREVER ? MP_FOREVER : mp_now() + patience)
    if (m->middle)
        goto middle;
    deadline = MP_DEADLINE;
again:
    if ((result = mp_lock_put(r, deadline)) != MP_OK)
        return result == MP_TIMEDOUT ? MP_BUSY : result;
    if (__builtin_expect(s->head - MP_LOAD(s->tail) > r->size, 0)) {
        mp_release(&s->put);
        return MP_CORRUPT;
    }
    if (most && mp_items(s) >= most) {
        mp_release(&s->put);
        return MP_TIMEDOUT;
    }
    span = mp_span(m->total);
    if (span <= r->size / 4) {
        if (!mp_room(r, span)) {
            mp_release(&s->put);
            if (patience == 0)
                return MP_BUSY;
            if ((result = mp_wait_space(r, span, bell, deadline)) != MP_OK)
                return result == MP_TIMEDOUT ? MP_BUSY : result;
            goto again;
        }
        mp_append(r, s->head, (uint32_t)m->total, MP_WHOLE, m->content, m->buffers);
        mp_copy(m, r->data + (s->head & r->mask) + sizeof(mp_record), m->total, 0);
        mp_publish(r, m, s->head + span, 1);
        result = mp_ring_bell(r, bell);
        mp_release(&s->put);
        return result;
    }
    /* Who won't wait for ever begins what the ring can hold only when it does: nothing is to be given up half-way. */
    n = m->total + 8 + (m->total / mp_piece(r) + 2) * 16;
    if (patience != MP_FOREVER && (patience == 0 || n <= r->size / 4 * 3) && !mp_room(r, n)) {
        mp_release(&s->put);
        if (patience == 0)
            return MP_BUSY;
        if ((result = mp_wait_space(r, n, bell, deadline)) != MP_OK)
            return result == MP_TIMEDOUT ? MP_BUSY : result;
        goto again;
    }
    s->writing = 1;
    m->middle = 1;
middle:
    while (1) {
        first = m->left == m->total ? 8 : 0;
        n = m->left + first < mp_piece(r) ? m->left : mp_piece(r) - first;
        span = mp_span(n + first);
        deadline = 0;
        while (!mp_room(r, span)) {
            if (deadline == 0)
                deadline = MP_DEADLINE;
            result = mp_wait_space(r, span, bell, deadline);
            if (result == MP_INTERRUPTED)
                return result;
            if (result != MP_OK) {
                mp_abandon(r);
                mp_release(&s->put);
                mp_rewind(m);
                return result == MP_TIMEDOUT ? MP_BUSY : result;
            }
        }
        unsigned char *place = r->data + (s->head & r->mask) + sizeof(mp_record);
        mp_append(r, s->head, (uint32_t)(n + first), first ? MP_FIRST : n == m->left ? MP_LAST : MP_MORE,
                  m->content, m->buffers);
        if (first)
            memcpy(place, &m->total, 8);
        mp_copy(m, place + first, n, 0);
        mp_publish(r, m, s->head + span, m->left == 0);
        result = mp_ring_bell(r, bell);
        if (m->left == 0)
            break;
    }
    s->writing = 0;
    m->middle = 0;
    mp_release(&s->put);
    return result;
#undef MP_DEADLINE
}

static void mp_put_cancel(mp_ring *r, mp_message *m)
{
    mp_abandon(r);
    mp_release(&r->s->put);
    mp_rewind(m);
}

/* ---- reading ---------------------------------------------------------------------------------------------------- */

typedef struct {
    unsigned char *bytes;
    uint64_t length, total, next;
    int first, content, parts;
} mp_found;

static inline void mp_freed(mp_ring *r)
{
    mp_shared *s = r->s;
    MP_FENCE();
    if (__builtin_expect(MP_LOAD(s->space_waiting), 0) &&
        MP_LOAD(s->head) - MP_LOAD(s->tail) <= r->size / 2 &&
        __atomic_exchange_n(&s->space_waiting, 0, __ATOMIC_RELAXED)) {
        __atomic_fetch_add(&s->space_turn, 1, __ATOMIC_RELAXED);
        mp_futex_wake(&s->space_turn, INT32_MAX);
    }
    if (__builtin_expect(MP_LOAD(s->slot_waiting), 0)) {
        __atomic_fetch_add(&s->slot_turn, 1, __ATOMIC_RELAXED);
        mp_futex_wake(&s->slot_turn, 1);
    }
}

static inline void mp_advance(mp_ring *r, uint64_t tail, int message)
{
    mp_shared *s = r->s;
    if (message) {
        s->intent_got = s->got_count + 1;
        s->intent_tail = tail;
    }
    __atomic_store_n(&s->tail, tail, __ATOMIC_RELEASE);
    if (message)
        MP_STORE(s->got_count, s->intent_got);
}

/* The record at `position`, checked. MP_OK, MP_BUSY (none), MP_CORRUPT. */
static inline int mp_look(mp_ring *r, uint64_t position, mp_found *f, int *piece)
{
    mp_shared *s = r->s;
    mp_record record;
    uint64_t there = s->seen_head - position;
    if (there == 0 || there > r->size) {
        s->seen_head = __atomic_load_n(&s->head, __ATOMIC_ACQUIRE);
        there = s->seen_head - position;
        if (there == 0)
            return MP_BUSY;
    }
    if (there > r->size || there < sizeof(record) || (position & 7))
        return MP_CORRUPT;
    memcpy(&record, r->data + (position & r->mask), sizeof(record));
    if (mp_span(record.length) > there)
        return MP_CORRUPT;
    f->bytes = r->data + (position & r->mask) + sizeof(record);
    f->length = f->total = record.length;
    f->next = position + mp_span(record.length);
    f->content = record.content;
    f->parts = record.parts;
    f->first = record.piece == MP_FIRST;
    *piece = record.piece;
    if (f->first) {
        if (f->length < 8)
            return MP_CORRUPT;
        memcpy(&f->total, f->bytes, 8);
        f->bytes += 8;
        f->length -= 8;
        if (f->total <= f->length || f->total > (UINT64_C(1) << 62))
            return MP_CORRUPT;
    }
    return MP_OK;
}

/* Find the next message, under `take`. MP_OK, MP_BUSY (none), MP_CORRUPT. */
static int mp_find(mp_ring *r, mp_found *f, int bell)
{
    mp_shared *s = r->s;
    int piece, result;
    while (1) {
        result = mp_look(r, s->tail, f, &piece);
        if (result != MP_OK)
            break;
        if (piece == MP_WHOLE || piece == MP_FIRST) {
            s->skipping = 0;
            return MP_OK;
        }
        if (piece == MP_ABANDONED) {
            s->skipping = 0;
            mp_advance(r, f->next, 0);
        } else if (s->skipping && (piece == MP_MORE || piece == MP_LAST)) {
            mp_advance(r, f->next, piece == MP_LAST);
            if (piece == MP_LAST)
                s->skipping = 0;
        } else {
            return MP_CORRUPT;
        }
        mp_freed(r);
    }
    if (result == MP_BUSY && (MP_LOAD(s->token) || MP_LOAD(s->external)))
        mp_quiet(r, bell, 0);
    return result;
}

/* Whether another process keeps us from reading (Pool does that when it ends), under `take`. A dead one doesn't. */
static inline int mp_barred(mp_ring *r)
{
    uint32_t holder = MP_LOAD(r->s->holder);
    if (__builtin_expect(holder == 0, 1) || holder == (uint32_t)getpid())
        return 0;
    if (kill((pid_t)holder, 0) == 0 || errno != ESRCH)
        return 1;
    MP_STORE(r->s->holder, 0);
    return 0;
}

static inline void mp_taken_last(mp_ring *r, uint64_t next, int bell)
{
    mp_advance(r, next, 1);
    mp_freed(r);
    /* A message can be taken before its writer has set the token: where it matters, the lock is what tells. */
    if ((MP_LOAD(r->s->token) || MP_LOAD(r->s->external)) && mp_empty(r))
        mp_quiet(r, bell, 0);
}

/* Copy a message out, under `take`, into m->parts, which hold m->total bytes; of a message in pieces wait for the rest.
 * MP_OK; MP_ENDED: its writer died or gave up, there is nothing; MP_CORRUPT. MP_INTERRUPTED: a signal; call again, or
 * leave the rest to be skipped by releasing the lock. */
static int mp_take(mp_ring *r, mp_found *f, mp_message *m, int bell)
{
    mp_shared *s = r->s;
    mp_found more;
    int piece, result, error;
    uint32_t turn;
    if (!m->middle) {
        mp_copy(m, f->bytes, f->length, 1);
        if (!f->first) {
            mp_taken_last(r, f->next, bell);
            return MP_OK;
        }
        s->skipping = 1;                /* whoever comes after us, if we die */
        mp_advance(r, f->next, 0);
        mp_freed(r);
        m->middle = 1;
    }
    while (1) {
        result = mp_look(r, s->tail, &more, &piece);
        if (result == MP_OK) {
            if (piece == MP_ABANDONED) {
                s->skipping = 0;
                mp_advance(r, more.next, 0);
                mp_freed(r);
                return MP_ENDED;
            }
            if ((piece != MP_MORE && piece != MP_LAST) || more.length > m->left ||
                (piece == MP_LAST) != (more.length == m->left))
                return MP_CORRUPT;
            mp_copy(m, more.bytes, more.length, 1);
            if (piece == MP_LAST) {
                mp_taken_last(r, more.next, bell);
                s->skipping = 0;
                return MP_OK;
            }
            mp_advance(r, more.next, 0);
            mp_freed(r);
            continue;
        }
        if (result != MP_BUSY)
            return result;
        if (r->most_spin) {
            int64_t until = mp_now() + r->most_spin;
            while (mp_empty(r) && mp_now() < until)
                for (int i = 0; i < 20; i++)
                    mp_pause();
            if (!mp_empty(r))
                continue;
        }
        turn = MP_LOAD(s->mid_turn);
        MP_STORE(s->mid_waiting, 1);
        MP_FENCE();
        if (!mp_empty(r))
            continue;
        error = mp_futex_wait(&s->mid_turn, turn, mp_slice(MP_FOREVER, 20000000));
        if (mp_orphan(&s->put) && mp_lock_put(r, 0) == MP_OK)
            mp_release(&s->put);        /* its heir has ended the message */
        if (error == EINTR || error == ETIMEDOUT)       /* as in mp_wait_space */
            return MP_INTERRUPTED;
    }
}

/* Whether a receive would find a message, under `take`: drops messages whose writer died. */
static int mp_ready(mp_ring *r, int bell)
{
    mp_shared *s = r->s;
    mp_found f, more;
    int piece, result;
again:
    if ((result = mp_find(r, &f, bell)) != MP_OK || !f.first)
        return result;
    if (mp_orphan(&s->put) && mp_lock_put(r, 0) == MP_OK)
        mp_release(&s->put);
    more = f;
    while ((result = mp_look(r, more.next, &more, &piece)) == MP_OK && piece == MP_MORE)
        ;
    if (result != MP_OK || piece != MP_ABANDONED)
        return result == MP_CORRUPT ? result : MP_OK;
    mp_advance(r, more.next, 0);
    mp_freed(r);
    goto again;
}

/* Sleep until there may be something to read, or until `deadline`. MP_OK leaves `turn` held (*turn): the caller takes
 * the message and releases it then, so that it wakes the next sleeper after that and not before.
 * MP_ENDED: the ring is empty and no writer is left. MP_BUSY: it has looked for a while (*spun), with `turn`; run what
 * signals came meanwhile and call again: it sleeps then. Otherwise *turn says whether it is held. */
static int mp_wait(mp_ring *r, int bell, int64_t deadline, int *turn, int *spun)
{
    mp_shared *s = r->s;
    struct pollfd p = {bell, POLLIN | POLLRDHUP, 0};
    struct timespec t, *timeout = NULL;
    int64_t now, until;
    int result, n;
    char byte;
    if (!*turn) {
        result = mp_acquire(&s->turn, deadline, 0);
        if (result != MP_OK && result != MP_DIED)
            return result;
        *turn = 1;
        if (result == MP_DIED)
            MP_STORE(s->looking, 0);
    }
    if (!mp_empty(r))
        return MP_OK;
    now = mp_now();
    /* Look while that pays: a sleeper costs its writer a system call, and itself the way back. Where it never does, now
     * and then, for two who sleep can't find out that both would be quick enough. */
    if (r->most_spin && !*spun && (r->vain < 16 || ++r->waits % 64 == 0)) {
        until = now + r->most_spin;
        if (until > deadline)
            until = deadline;
        MP_STORE(s->looking, 1);
        MP_FENCE();
        while (now < until && mp_empty(r)) {
            for (int i = 0; i < 20 && mp_empty(r); i++)
                mp_pause();
            now = mp_now();
        }
        /* A writer that found it set has published, before it cleared it: that message has no byte, so look again. */
        __atomic_exchange_n(&s->looking, 0, __ATOMIC_SEQ_CST);
        if (!mp_empty(r)) {
            r->vain = 0;
            return MP_OK;
        }
        r->vain++;
        *spun = 1;
        return MP_BUSY;
    }
    if (deadline != MP_FOREVER) {
        if (now >= deadline)
            return MP_TIMEDOUT;
        t.tv_sec = (deadline - now) / 1000000000;
        t.tv_nsec = (deadline - now) % 1000000000;
        timeout = &t;
    }
    n = ppoll(&p, 1, timeout, NULL);
    if (n < 0)
        return errno == EINTR ? MP_INTERRUPTED : MP_SYSTEM;
    if (!mp_empty(r))
        return MP_OK;
    if (n == 0)
        return MP_TIMEDOUT;
    /* No message: a byte that is left over, or the end. */
    if (MP_LOAD(s->token))
        mp_quiet(r, bell, mp_now() + 10000000);
    else
        mp_heal(r);
    n = (int)recv(bell, &byte, 1, MSG_DONTWAIT | MSG_PEEK);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        return mp_empty(r) ? MP_ENDED : MP_OK;
    if (n == 1 && mp_empty(r) && !MP_LOAD(s->token) && mp_lock_put(r, mp_now() + 2000000) == MP_OK) {
        if (mp_empty(r) && !s->token)   /* a writer died between the byte and the word */
            mp_drain(bell);
        mp_release(&s->put);
    }
    return MP_OK;
}

/* A reading end was closed: writers look whether it was the last, also those that wait for room. */
static void mp_reader_closed(mp_ring *r)
{
    __atomic_fetch_add(&r->s->closes, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&r->s->space_turn, 1, __ATOMIC_RELAXED);
    mp_futex_wake(&r->s->space_turn, INT32_MAX);
}

static inline uint32_t mp_closes(mp_ring *r)
{
    return MP_LOAD(r->s->closes);
}

static inline uint64_t mp_progress(mp_ring *r)
{
    return MP_LOAD(r->s->tail);
}

/* While another process keeps us from reading: until it may have changed, or `deadline`. */
static void mp_wait_barred(mp_ring *r, int64_t deadline)
{
    uint32_t holder = MP_LOAD(r->s->holder);
    if (holder)
        mp_futex_wait(&r->s->holder, holder, mp_slice(deadline, 100000000));
}

static void mp_bar(mp_ring *r, uint32_t holder)
{
    MP_STORE(r->s->holder, holder);
    if (!holder)
        mp_futex_wake(&r->s->holder, INT32_MAX);
}

/* ---- feeders and joins ------------------------------------------------------------------------------------------ */

/* Take a slot for the calling thread, which keeps it while it feeds. NULL: all are taken. */
static mp_slot *mp_slot_take(mp_ring *r)
{
    mp_shared *s = r->s;
    for (uint32_t i = 0; i < MP_SLOTS; i++) {
        int result = mp_try(&s->slots[i].lock, 0);
        if (result != MP_OK && result != MP_DIED)
            continue;
        MP_STORE(s->slots[i].count, 0);
        uint32_t seen = MP_LOAD(s->backlogs);
        while (seen < i + 1 && !__atomic_compare_exchange_n(&s->backlogs, &seen, i + 1, 0,
                                                            __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            ;
        return &s->slots[i];
    }
    return NULL;
}

/* Count one more message that waits in this process. MP_OK, MP_TIMEDOUT (`most` are there), or what the lock says.
 * Without `most` it waits for nobody. */
static int mp_reserve(mp_ring *r, mp_slot *slot, uint64_t most, int64_t patience)
{
    int result;
    if (most) {
        if ((result = mp_lock_put(r, mp_now() + patience)) != MP_OK)
            return result;
        if (mp_items(r->s) >= most) {
            mp_release(&r->s->put);
            return MP_TIMEDOUT;
        }
    }
    __atomic_fetch_add(&slot->count, 1, __ATOMIC_RELAXED);
    if (most)
        mp_release(&r->s->put);
    return MP_OK;
}

static uint64_t mp_unfinished(mp_ring *r)
{
    mp_heal(r);
    int64_t n = (int64_t)(MP_LOAD(r->s->put_count) + mp_backlog(r->s) - MP_LOAD(r->s->done));
    return n > 0 ? (uint64_t)n : 0;
}

static int mp_task_done(mp_ring *r)
{
    mp_shared *s = r->s;
    uint64_t done = MP_LOAD(s->done);
    do
        if (mp_unfinished(r) == 0)
            return MP_BUSY;
    while (!__atomic_compare_exchange_n(&s->done, &done, done + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
    MP_FENCE();
    if (MP_LOAD(s->joiners) && mp_unfinished(r) == 0) {
        __atomic_fetch_add(&s->done_turn, 1, __ATOMIC_RELAXED);
        mp_futex_wake(&s->done_turn, INT32_MAX);
    }
    return MP_OK;
}

/* Wait until all is done. A slice of time, for who should wake us may have died. */
static int mp_join(mp_ring *r)
{
    mp_shared *s = r->s;
    uint32_t turn = MP_LOAD(s->done_turn);
    int error = 0;
    __atomic_fetch_add(&s->joiners, 1, __ATOMIC_RELAXED);
    MP_FENCE();
    if (mp_unfinished(r) != 0)
        error = mp_futex_wait(&s->done_turn, turn, mp_slice(MP_FOREVER, 500000000));
    __atomic_fetch_sub(&s->joiners, 1, __ATOMIC_RELAXED);
    if (error == EINTR)
        return MP_INTERRUPTED;
    /* Woken means that it was zero once, which is enough, as in the standard library. */
    return error == 0 || mp_unfinished(r) == 0 ? MP_OK : MP_BUSY;
}

#endif
