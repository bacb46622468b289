/* Looking at a ring (ring.h) before one sleeps: flags, clocks, and turning for a while.
 *
 * Nothing here calls the kernel but for the time. Used by wires/_shm*.pyx. */
#ifndef ANYWIRE_RING_LOOKS_H
#define ANYWIRE_RING_LOOKS_H

#include "anywire/ipc/ring.h"
#include <time.h>

#if defined(__x86_64__) || defined(__i386__)
#define aw_relax() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define aw_relax() __asm__ __volatile__("isb")
#else
#define aw_relax() ((void) 0)
#endif
static inline uint64_t aw_load(const _Atomic uint64_t *p) { return atomic_load_explicit(p, memory_order_relaxed); }
static inline uint64_t aw_taken(aw_control *c) { return aw_load(&c->taken); }
static inline uint64_t aw_echo(aw_control *c) { return aw_load(&c->echo); }
static inline void aw_set_echo(aw_control *c, uint64_t v) {
    atomic_store_explicit(&c->echo, v, memory_order_release);
}
static inline int aw_closed(aw_control *c) { return atomic_load_explicit(&c->closed, memory_order_acquire) != 0; }
static inline void aw_set_closed(aw_control *c) { atomic_store_explicit(&c->closed, 1, memory_order_release); }
static inline int aw_data_wanted(aw_control *c) {
    return atomic_load_explicit(&c->data_wanted, memory_order_relaxed) != 0;
}
static inline int aw_room_wanted(aw_control *c) {
    return atomic_load_explicit(&c->room_wanted, memory_order_relaxed) != 0;
}
/* What a sender waits for: room for a record of `need` bytes, or, for AW_AN_EXTENT, that some extent comes back. */
#define AW_AN_EXTENT UINT64_MAX
static inline int aw_can_send(aw_producer *p, uint64_t need) {
    return need == AW_AN_EXTENT ? aw_load(&p->control->returned) != p->returned_seen : aw_has_room(p, need) != 0;
}
static inline int aw_ready(aw_consumer *c, aw_producer *p, uint64_t need) {
    return c != NULL ? aw_has_data(c) != 0 : aw_can_send(p, need);
}
/* As aw_sleep_for_room, for either. */
static inline int aw_sleep_to_send(aw_producer *p, uint64_t need) {
    return aw_sleep_for_room(p, need == AW_AN_EXTENT ? p->size : need) < 0 || aw_can_send(p, need);
}
static inline uint64_t aw_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t) t.tv_sec * 1000000000u + (uint64_t) t.tv_nsec;
}
/* A clock that costs a few nanoseconds and moves once a millisecond or so. */
static inline uint64_t aw_tick(void) {
#if defined(__x86_64__) || defined(__i386__)
    return __builtin_ia32_rdtsc() >> 21;
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (uint64_t) t.tv_sec * 1000000000u + (uint64_t) t.tv_nsec;
#endif
}
/* Look for data, or for room, `ns` nanoseconds long: 1 there is some (or nonsense: the caller finds out), 0 time is up. */
static int aw_spin(aw_consumer *c, aw_producer *p, uint64_t need, uint64_t ns) {
    uint64_t end = aw_now() + ns;
    for (;;) {
        for (int i = 0; i < 32; i++) {
            if (aw_ready(c, p, need))
                return 1;
            aw_relax();
        }
        if (aw_now() >= end)
            return 0;
    }
}
/* The same without a clock, for about a microsecond. */
static int aw_glance(aw_consumer *c, aw_producer *p, uint64_t need) {
    for (int i = 0; i < 40; i++) {
        if (aw_ready(c, p, need))
            return 1;
        aw_relax();
    }
    return 0;
}

#endif
