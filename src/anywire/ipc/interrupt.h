/* Who waits in a system call that only a signal ends: for calls that take neither a second descriptor to wait for nor a
 * time-out that costs nothing.
 *
 * Who waits is in a list from just before the call until just after it; all that touches a list holds the GIL. Who ends
 * the waits signals all in the list, again and again until it is empty: a signal that comes just before the call ends
 * nothing. The signal is that of _interrupt.pyx. A thread that has it blocked when it first waits has to wait in
 * another way. */
#ifndef ANYWIRE_INTERRUPT_H
#define ANYWIRE_INTERRUPT_H

#include <pthread.h>
#include <signal.h>

struct aw_waiter {
    pthread_t thread;
    struct aw_waiter *next, **place;
};

static inline void aw_enlist(struct aw_waiter **list, struct aw_waiter *waiter) {
    waiter->thread = pthread_self();
    waiter->place = list;
    waiter->next = *list;
    if (waiter->next)
        waiter->next->place = &waiter->next;
    *list = waiter;
}

static inline void aw_delist(struct aw_waiter *waiter) {
    *waiter->place = waiter->next;
    if (waiter->next)
        waiter->next->place = waiter->place;
}

/* Whether the signal of this number comes through to this thread. Asked of the kernel once a thread. */
static inline int aw_interruptible(int number) {
    static __thread int known;
    if (!known) {
        sigset_t blocked;
        known = pthread_sigmask(SIG_BLOCK, NULL, &blocked) || sigismember(&blocked, number) ? -1 : 1;
    }
    return known > 0;
}

/* Signal those who are in the list. */
static inline void aw_interrupt(const struct aw_waiter *list, int number) {
    for (; list; list = list->next)
        pthread_kill(list->thread, number);
}

#endif
