/* The layout of locks in shared memory, and waiting for them by the monotonic clock (pthread_mutexattr_setrobust(3)).
 *
 *   offset  bytes
 *        0      8   magic: "AWMUTEX1", "AWCOND_1" or "AWRWLK_1"; written last, so whoever sees it sees the rest
 *        8      4   size of the C library's object
 *       12      4   RWLock: number of the process that holds it for writing, or 0. Condition: how often it was notified
 *       16     48   0
 *       64     64   pthread_mutex_t, pthread_cond_t or pthread_rwlock_t
 *
 * A C program maps the same memory and calls the C library on what lies at offset 64. Used by mutex.pyx, condition.pyx,
 * rwlock.pyx. */
#ifndef ANYWIRE_LOCKS_H
#define ANYWIRE_LOCKS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "anywire/ipc/clock.h"

#define AW_LOCK_SIZE 128
#define AW_LOOK 100000000                       /* ns: how soon the main thread looks for signals */

struct aw_lock {
    _Atomic uint64_t magic;
    uint32_t size;
    _Atomic int32_t writer;
    char nothing[48];
    union {
        pthread_mutex_t mutex;
        pthread_cond_t condition;
        pthread_rwlock_t rwlock;
    } c;
};

_Static_assert(offsetof(struct aw_lock, c) == 64, "the C library's object lies at offset 64");
_Static_assert(sizeof(struct aw_lock) <= AW_LOCK_SIZE, "the C library's objects have at most 64 bytes");

enum { AW_MUTEX, AW_CONDITION, AW_RWLOCK };
static const char aw_magic[3][9] = { "AWMUTEX1", "AWCOND_1", "AWRWLK_1" };
static const uint32_t aw_size[3] = { sizeof(pthread_mutex_t), sizeof(pthread_cond_t), sizeof(pthread_rwlock_t) };

/* Before the object is made: no magic yet. */
static inline void aw_begin_lock(struct aw_lock *l, int kind) {
    atomic_store(&l->magic, 0);
    memset((char *)l + 8, 0, AW_LOCK_SIZE - 8);
    l->size = aw_size[kind];
}

static inline void aw_finish_lock(struct aw_lock *l, int kind) {
    uint64_t magic;
    memcpy(&magic, aw_magic[kind], 8);
    atomic_store(&l->magic, magic);
}

/* 0: it is one of this kind. 1: it is something else. 2: it is one, of a C library with other sizes. */
static inline int aw_check_lock(struct aw_lock *l, int kind) {
    uint64_t magic, found = atomic_load(&l->magic);
    memcpy(&magic, aw_magic[kind], 8);
    return found != magic ? 1 : l->size != aw_size[kind] ? 2 : 0;
}

static int aw_make_mutex(pthread_mutex_t *m) {
    pthread_mutexattr_t a;
    int e = pthread_mutexattr_init(&a);
    if (!e) {
        if (!(e = pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED))
            && !(e = pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST))
            && !(e = pthread_mutexattr_settype(&a, PTHREAD_MUTEX_ERRORCHECK)))
            e = pthread_mutex_init(m, &a);
        pthread_mutexattr_destroy(&a);
    }
    return e;
}

static int aw_make_condition(pthread_cond_t *c) {
    pthread_condattr_t a;
    int e = pthread_condattr_init(&a);
    if (!e) {
        if (!(e = pthread_condattr_setpshared(&a, PTHREAD_PROCESS_SHARED))
            && !(e = pthread_condattr_setclock(&a, CLOCK_MONOTONIC)))
            e = pthread_cond_init(c, &a);
        pthread_condattr_destroy(&a);
    }
    return e;
}

static int aw_make_rwlock(pthread_rwlock_t *l, int prefer_writers) {
    pthread_rwlockattr_t a;
    int e = pthread_rwlockattr_init(&a);
    if (!e) {
        e = pthread_rwlockattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
#ifdef __GLIBC__
        if (!e && prefer_writers)
            e = pthread_rwlockattr_setkind_np(&a, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
#endif
        if (!e)
            e = pthread_rwlock_init(l, &a);
        pthread_rwlockattr_destroy(&a);
    }
    return e;
}

/* -- waiting -------------------------------------------------------------------------------------------------------- */

/* Since glibc 2.30; weak as in semaphore.h. */
extern int pthread_mutex_clocklock(pthread_mutex_t *, clockid_t, const struct timespec *) __attribute__((weak));
extern int pthread_rwlock_clockrdlock(pthread_rwlock_t *, clockid_t, const struct timespec *) __attribute__((weak));
extern int pthread_rwlock_clockwrlock(pthread_rwlock_t *, clockid_t, const struct timespec *) __attribute__((weak));
static int aw_no_clocklock;                     /* set by tests */

/* No signal ends these waits, and Python's handlers run in the main thread only: there they are cut into pieces. */
static inline int64_t aw_piece(int64_t deadline) {
    int64_t soon;
    if (syscall(SYS_gettid) != getpid())
        return deadline;
    soon = aw_now() + AW_LOOK;
    return deadline < 0 || soon < deadline ? soon : deadline;
}

enum { AW_LOCK, AW_READ, AW_WRITE };

static int aw_call_lock(struct aw_lock *l, int how, const struct timespec *until, int monotonic) {
    pthread_mutex_t *m = &l->c.mutex;
    pthread_rwlock_t *w = &l->c.rwlock;
    if (!until)
        return how == AW_LOCK ? pthread_mutex_lock(m) : how == AW_READ ? pthread_rwlock_rdlock(w)
                                                                       : pthread_rwlock_wrlock(w);
    if (!monotonic)
        return how == AW_LOCK ? pthread_mutex_timedlock(m, until) : how == AW_READ ? pthread_rwlock_timedrdlock(w, until)
                                                                                 : pthread_rwlock_timedwrlock(w, until);
    return how == AW_LOCK ? pthread_mutex_clocklock(m, CLOCK_MONOTONIC, until)
         : how == AW_READ ? pthread_rwlock_clockrdlock(w, CLOCK_MONOTONIC, until)
                          : pthread_rwlock_clockwrlock(w, CLOCK_MONOTONIC, until);
}

/* Until `deadline` of the monotonic clock or, in the main thread, a little while; -1: for ever. */
static int aw_lock_wait(struct aw_lock *l, int how, int64_t deadline) {
    int64_t end = aw_piece(deadline);
    struct timespec t;
    int e;
    if (end < 0)
        return aw_call_lock(l, how, NULL, 1);
    if (pthread_mutex_clocklock && pthread_rwlock_clockrdlock && pthread_rwlock_clockwrlock && !aw_no_clocklock) {
        t = aw_time(end);
        return aw_call_lock(l, how, &t, 1);
    }
    for (;;) {
        t = aw_slice(end);
        e = aw_call_lock(l, how, &t, 0);
        if (e != ETIMEDOUT || aw_now() >= end)
            return e;
    }
}

/* EBUSY if somebody else has it. Not pthread_mutex_trylock: that of glibc leaves a mutex that is not recoverable locked, so
 * that all others wait for ever instead of being told (seen in 2.36). A wait whose time is over does the same without it. */
static inline int aw_mutex_try(struct aw_lock *l) {
    static const struct timespec long_ago = { 0, 0 };
    int e = pthread_mutex_timedlock(&l->c.mutex, &long_ago);
    return e == ETIMEDOUT ? EBUSY : e;
}

/* The condition's clock is the monotonic one: aw_make_condition. */
static int aw_condition_wait(struct aw_lock *c, struct aw_lock *m, int64_t deadline) {
    int64_t end = aw_piece(deadline);
    struct timespec t;
    if (end < 0)
        return pthread_cond_wait(&c->c.condition, &m->c.mutex);
    t = aw_time(end);
    return pthread_cond_timedwait(&c->c.condition, &m->c.mutex, &t);
}

static inline int32_t aw_writer(struct aw_lock *l) { return atomic_load(&l->writer); }
static inline void aw_set_writer(struct aw_lock *l, int32_t pid) { atomic_store(&l->writer, pid); }

static inline uint32_t aw_notifications(struct aw_lock *l) { return (uint32_t)atomic_load(&l->writer); }
static inline void aw_count_notification(struct aw_lock *l) { atomic_fetch_add(&l->writer, 1); }

#endif
