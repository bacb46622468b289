/* POSIX semaphores: waiting by the monotonic clock, and for many of them at a time (sem_overview(7), futex(2)).
 *
 * A sem_t of glibc on 64-bit machines is one 64-bit word, the value in its lower half and the number of those who sleep in
 * its upper one (sysdeps/nptl/internaltypes.h, struct new_sem; the layout is part of glibc's ABI, as processes with
 * different versions share semaphores). sem_post adds one to the word and wakes one sleeper of the lower half's futex when
 * the upper half is not 0. So a thread that counts itself in the upper halves may sleep at many lower halves by one
 * futex_waitv (Linux 5.16). aw_sem_known tells whether all this is so here. Used by semaphore.pyx.
 */
#ifndef ANYWIRE_SEMAPHORE_H
#define ANYWIRE_SEMAPHORE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <limits.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "anywire/ipc/clock.h"

/* Since glibc 2.30. Weak: a wheel built against an older one uses it where it runs with a newer one. */
extern int sem_clockwait(sem_t *, clockid_t, const struct timespec *) __attribute__((weak));
static int aw_no_clockwait;                     /* set by tests */

/* Until `deadline` of the monotonic clock, -1: for ever. 0, or the error's number: ETIMEDOUT, EINTR. */
static int aw_sem_wait(sem_t *s, int64_t deadline) {
    struct timespec t;
    if (deadline < 0)
        return sem_wait(s) ? errno : 0;
    if (sem_clockwait && !aw_no_clockwait) {
        t = aw_time(deadline);
        return sem_clockwait(s, CLOCK_MONOTONIC, &t) ? errno : 0;
    }
    for (;;) {
        t = aw_slice(deadline);
        if (!sem_timedwait(s, &t))
            return 0;
        if (errno != ETIMEDOUT)
            return errno;
        if (aw_now() >= deadline)
            return ETIMEDOUT;
    }
}

/* -- for many at a time: the helper's side -------------------------------------------------------------------------- */

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449                     /* the same on all architectures */
#endif
#define AW_FUTEX_32 2
#define AW_FUTEX_PRIVATE 128
#define AW_SLEEPER ((uint64_t)1 << 32)
#define AW_MOST 128                             /* FUTEX_WAITV_MAX */

struct aw_waitv { uint64_t value, address; uint32_t flags, reserved; };
struct aw_sem { _Atomic uint64_t word; };

static _Atomic uint32_t aw_called;              /* changes whenever the helper is wanted */

static inline long aw_waitv_call(struct aw_waitv *v, unsigned count) {
    return syscall(SYS_futex_waitv, v, count, 0, NULL, CLOCK_MONOTONIC);
}

static int aw_sem_known(void) {
#if defined(__GLIBC__) && __SIZEOF_POINTER__ == 8
    struct aw_waitv v = { 0, (uint64_t)(uintptr_t)&aw_called, AW_FUTEX_32 | AW_FUTEX_PRIVATE, 0 };
    union { sem_t sem; struct aw_sem known; } s;
    int value = -1;
    v.value = (uint32_t)(atomic_load(&aw_called) + 1);
    if (aw_waitv_call(&v, 1) == 0 || errno != EAGAIN)
        return 0;                               /* an older kernel, or a filter of system calls */
    memset(&s, 0, sizeof s);
    if (sem_init(&s.sem, 1, 3) || atomic_load(&s.known.word) != 3)
        return 0;
    atomic_fetch_add(&s.known.word, AW_SLEEPER);
    if (sem_post(&s.sem) || sem_getvalue(&s.sem, &value) || value != 4)
        return 0;
    return atomic_load(&s.known.word) == AW_SLEEPER + 4;
#else
    return 0;
#endif
}

static void aw_call_helper(void) {
    atomic_fetch_add(&aw_called, 1);
    syscall(SYS_futex, &aw_called, 1 /* FUTEX_WAKE */ | AW_FUTEX_PRIVATE, 1, NULL, NULL, 0);
}

/* Sleep until one of the semaphores is above 0 or the helper is called, if it was not called since `seen`. It may also
 * wake for nothing. 0, or -1: the kernel refuses to wait for these. */
static int aw_wait_for_any(sem_t **all, unsigned count, uint32_t seen) {
    struct aw_waitv v[AW_MOST];
    long woken;
    v[0] = (struct aw_waitv){ seen, (uint64_t)(uintptr_t)&aw_called, AW_FUTEX_32 | AW_FUTEX_PRIVATE, 0 };
    for (unsigned i = 0; i < count; i++) {
        struct aw_sem *s = (struct aw_sem *)all[i];
        uintptr_t half = (uintptr_t)&s->word + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 4 : 0);
        v[i + 1] = (struct aw_waitv){ 0, half, AW_FUTEX_32, 0 };
        /* Before the kernel compares the value: who posts later sees a sleeper, who posted earlier has changed the value. */
        atomic_fetch_add(&s->word, AW_SLEEPER);
    }
    woken = aw_waitv_call(v, count + 1);
    if (woken < 0)
        woken = errno == EAGAIN || errno == EINTR ? 0 : -1;
    for (unsigned i = 0; i < count; i++)
        atomic_fetch_sub(&((struct aw_sem *)all[i])->word, AW_SLEEPER);
    return woken < 0 ? -1 : 0;
}

/* A wake-up that came to us and that we have no use for: whoever else sleeps there gets it. */
static inline void aw_pass_on(sem_t *s) {
    if (!sem_trywait(s))
        sem_post(s);
}

#endif
