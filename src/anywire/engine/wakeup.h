/* Waking a thread that waits in a demultiplexer: from any thread, with or without the GIL, and from signal handlers
   (nothing here but atomics and write(2), both async-signal-safe).

   A flood costs one write: only who turns the flag from 0 to 1 writes. The waiting side reads, clears the flag, and only
   then looks at what it was woken for. So whoever put something there before its aw_wake is either seen by that look, or
   found the flag clear and wrote again. Both sides' accesses to the flag are sequentially consistent. */
#ifndef ANYWIRE_WAKEUP_H
#define ANYWIRE_WAKEUP_H

#include <errno.h>
#include <stdint.h>
#include <unistd.h>

typedef struct {
    int flag;           /* 1: a wake is written, or about to be, and not yet drained */
    int read_fd;
    int write_fd;
    int counter;        /* 1: eventfd, which takes eight bytes */
    uint64_t written;   /* how many writes there were */
} aw_wakeup;

/* 0, or the error's number; errno stays as it was. */
static inline int aw_wake(aw_wakeup *w)
{
    int kept, e = 0;
    uint64_t one = 1;
    ssize_t n;
    if (__atomic_exchange_n(&w->flag, 1, __ATOMIC_SEQ_CST))
        return 0;
    kept = errno;
    do
        n = write(w->write_fd, &one, w->counter ? sizeof one : 1);
    while (n < 0 && errno == EINTR);
    /* Full means that there is something to read: as good as written. */
    if (n < 0 && errno != EAGAIN) {
        e = errno;
        __atomic_store_n(&w->flag, 0, __ATOMIC_SEQ_CST);
    }
    else
        __atomic_fetch_add(&w->written, 1, __ATOMIC_RELAXED);
    errno = kept;
    return e;
}

/* For who watches an eventfd edge-triggered in an epoll: each write is reported, whatever the counter was before, so nothing
   needs to be read (it is full after 2^64 writes). Clear the flag; then look at what there is to do. */
static inline void aw_heard(aw_wakeup *w)
{
    __atomic_store_n(&w->flag, 0, __ATOMIC_SEQ_CST);
}

/* Make it unreadable and clear the flag; then look at what there is to do. */
static inline void aw_drain(aw_wakeup *w)
{
    char bytes[512];
    ssize_t n;
    do
        n = read(w->read_fd, bytes, sizeof bytes);
    while (w->counter ? n < 0 && errno == EINTR : n == (ssize_t) sizeof bytes || (n < 0 && errno == EINTR));
    __atomic_store_n(&w->flag, 0, __ATOMIC_SEQ_CST);
}

#endif
