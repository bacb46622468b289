/* Moments of the monotonic clock in nanoseconds, and waiting by it where the C library knows the wall clock only. */
#ifndef ANYWIRE_CLOCK_H
#define ANYWIRE_CLOCK_H

#include <stdint.h>
#include <time.h>

#define AW_SECOND 1000000000

static inline int64_t aw_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * AW_SECOND + t.tv_nsec;
}

static inline struct timespec aw_time(int64_t ns) {
    return (struct timespec){ ns / AW_SECOND, ns % AW_SECOND };
}

/* For calls that go by the wall clock (sem_timedwait and its like): when the next slice of a wait until `deadline` ends
 * there. In slices of a second at most, so that whoever sets that clock ends no wait early, and makes one last longer by
 * what is left of a slice: both musl and older glibc sleep for the difference that they find. */
static inline struct timespec aw_slice(int64_t deadline) {
    struct timespec t;
    int64_t left = deadline - aw_now();
    if (left < 0)
        left = 0;
    if (left > AW_SECOND)
        left = AW_SECOND;
    clock_gettime(CLOCK_REALTIME, &t);
    return aw_time((int64_t)t.tv_sec * AW_SECOND + t.tv_nsec + left);
}

#endif
