/* Ending a system call that has no time-out of its own: a POSIX timer that signals one thread, again and again.
 *
 * msgsnd(2), msgrcv(2) and semop(2) are never restarted after a signal, fcntl(2) and open(2) not after a handler
 * without SA_RESTART (signal(7)), and all say truly whether they did their work: EINTR means that nothing was taken or
 * left. A signal that comes just before the thread enters the call would be lost, so the timer repeats until it is
 * deleted. The signal is a real-time one that nobody has a handler for, goes to that thread alone (SIGEV_THREAD_ID,
 * timer_create(2)), and its handler does nothing. */
#ifndef ANYWIRE_IPC_INTERRUPT_TIMER_H
#define ANYWIRE_IPC_INTERRUPT_TIMER_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

#define ANYWIRE_REPEAT_NS 1000000               /* a lost signal costs this much, once in very many waits */

static void anywire_nothing(int number) { (void) number; }

/* The signal, installed if it is not (or if somebody took it away); -1: no real-time signal is free. One thread at a
 * time. */
static int anywire_free_signal(void) {
    static int mine = 0;
    struct sigaction now, ours;
    int number;
    if (mine && sigaction(mine, NULL, &now) == 0 && now.sa_handler == anywire_nothing)
        return mine;
    memset(&ours, 0, sizeof ours);
    ours.sa_handler = anywire_nothing;          /* without SA_RESTART */
    sigfillset(&ours.sa_mask);
    for (number = SIGRTMAX - 5; number >= SIGRTMIN; number--) {
        if (sigaction(number, NULL, &now) < 0 || (now.sa_flags & SA_SIGINFO) || now.sa_handler != SIG_DFL)
            continue;
        if (sigaction(number, &ours, NULL) == 0)
            return mine = number;
    }
    errno = EBUSY;
    return -1;
}

/* A timer that will signal the calling thread; the signal is let through to it. 0, or -1 and errno. */
static int anywire_timer_make(timer_t* timer, sigset_t* before) {
    struct sigevent event;
    sigset_t let;
    int number = anywire_free_signal();
    if (number < 0)
        return -1;
    memset(&event, 0, sizeof event);
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = number;
    event.sigev_notify_thread_id = (pid_t) syscall(SYS_gettid);
    if (timer_create(CLOCK_MONOTONIC, &event, timer) < 0)
        return -1;
    sigemptyset(&let);
    sigaddset(&let, number);
    pthread_sigmask(SIG_UNBLOCK, &let, before);
    return 0;
}

/* From this moment of CLOCK_MONOTONIC on, in nanoseconds (at least 1), signal, and repeat. Any thread. */
static int anywire_timer_at(timer_t timer, int64_t moment) {
    struct itimerspec when;
    when.it_value.tv_sec = moment / 1000000000;
    when.it_value.tv_nsec = moment % 1000000000;
    when.it_interval.tv_sec = 0;
    when.it_interval.tv_nsec = ANYWIRE_REPEAT_NS;
    return timer_settime(timer, TIMER_ABSTIME, &when, NULL);
}

static void anywire_timer_drop(timer_t timer, const sigset_t* before) {
    timer_delete(timer);
    pthread_sigmask(SIG_SETMASK, before, NULL);
}

#endif
