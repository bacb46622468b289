/* Ends system calls in which other threads of this process wait, by a signal that does nothing else.
 *
 * For calls that take neither a second descriptor to wait for nor a time-out that costs nothing. Who waits is in a list
 * from just before the call until just after it; all that touches a list holds the GIL. Who ends the waits signals all in
 * the list, again and again until it is empty: a signal that comes just before the call ends nothing.
 *
 * The signal is SIGURG, which nobody notices who has no handler for it (signal(7)). Only while waits are being ended
 * there is a handler of ours, without SA_RESTART; what others send goes on to the handler that was there before. A thread
 * that has SIGURG blocked when it first waits is not interruptible, and has to wait in another way. */
#ifndef ANYWIRE_INTERRUPT_H
#define ANYWIRE_INTERRUPT_H

#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

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

/* Whether this thread can be interrupted. Asked of the kernel once a thread. */
static inline int aw_interruptible(void) {
    static __thread int known;
    if (!known) {
        sigset_t blocked;
        known = pthread_sigmask(SIG_BLOCK, NULL, &blocked) || sigismember(&blocked, SIGURG) ? -1 : 1;
    }
    return known > 0;
}

enum { AW_AT_ONCE = 64 };
/* Of the one who ends waits; the threads stay readable, since a handler may still run when all is over. */
static pthread_t aw_threads[AW_AT_ONCE];
static volatile int aw_count;
static int aw_installed;
static struct sigaction aw_before;

static void aw_interrupted(int number, siginfo_t *info, void *context) {
    if (info->si_code == SI_TKILL && info->si_pid == getpid())
        for (int i = 0; i < aw_count; i++)
            if (pthread_equal(aw_threads[i], pthread_self()))
                return;
    if (aw_before.sa_flags & SA_SIGINFO)
        aw_before.sa_sigaction(number, info, context);
    else if (aw_before.sa_handler != SIG_DFL && aw_before.sa_handler != SIG_IGN)
        aw_before.sa_handler(number);
}

static void aw_interrupt_begin(void) {
    struct sigaction ours;
    memset(&ours, 0, sizeof ours);
    sigaction(SIGURG, NULL, &aw_before);
    ours.sa_sigaction = aw_interrupted;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    ours.sa_mask = aw_before.sa_mask;
    aw_installed = sigaction(SIGURG, &ours, NULL) == 0;
}

/* Signal those who are in the list. */
static void aw_interrupt(struct aw_waiter *list) {
    int count = 0;
    aw_count = 0;
    for (; list && count < AW_AT_ONCE; list = list->next)
        aw_threads[count++] = list->thread;
    aw_count = count;
    for (int i = 0; aw_installed && i < count; i++)
        pthread_kill(aw_threads[i], SIGURG);
}

/* Put back what was there before, unless somebody has set a handler meanwhile. Also for a child that was forked meanwhile. */
static void aw_interrupt_end(void) {
    struct sigaction now;
    if (aw_installed && sigaction(SIGURG, NULL, &now) == 0 && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == aw_interrupted)
        sigaction(SIGURG, &aw_before, NULL);
    aw_installed = 0;
}

#endif
