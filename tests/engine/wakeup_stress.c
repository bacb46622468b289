/* wakeup.h between eight threads that wake without any lock, a signal handler that wakes in the middle of them, and one
 * that sleeps in poll(2). Compiled and run by test_wakeup_stress.py.
 *
 *   wakeup_stress KIND COUNT     KIND: eventfd or pipe; COUNT: items a thread
 *
 * Each item is one step of a counter, made just before a wake. The waiting side sleeps only when it has seen all that was
 * there after it drained; if it then sleeps for PATIENCE while something is there, a wake was lost: exit 1.
 *
 * With -DAMID each drain is also woken just before and just after each of its reads. In the right order those wakes lose
 * nothing; in the wrong one the first of them is lost for certain, and all that follow.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/time.h>
#include <unistd.h>

#ifdef AMID
static void on_signal(int number);

static ssize_t read_amid_wakes(int fd, void *bytes, size_t size)
{
    ssize_t n;
    on_signal(0);
    n = read(fd, bytes, size);
    on_signal(0);
    return n;
}
#define read read_amid_wakes
#endif
#include "wakeup.h"
#undef read

#define THREADS 8
#ifndef PATIENCE
#define PATIENCE 2000                       /* ms */
#endif

static aw_wakeup wakeup;
static unsigned long made[THREADS + 1];     /* the last one is the signal handler's */
static unsigned long each;

static void *hammer(void *argument)
{
    unsigned long *mine = argument, i;
    for (i = 0; i < each; i++) {
        __atomic_fetch_add(mine, 1, __ATOMIC_RELAXED);
        if (aw_wake(&wakeup)) {
            perror("aw_wake");
            exit(1);
        }
        if (i % 1024 == 0)
            sched_yield();
    }
    return NULL;
}

static void on_signal(int number)
{
    (void) number;
    __atomic_fetch_add(&made[THREADS], 1, __ATOMIC_RELAXED);
    aw_wake(&wakeup);
}

int main(int count, char **arguments)
{
    pthread_t threads[THREADS];
    struct itimerval often = {{0, 500}, {0, 500}}, never = {{0, 0}, {0, 0}};
    struct sigaction action;
    unsigned long seen = 0, turns = 0, now, last = 0;
    int i, fds[2], ended = 0, interrupts = 0;
    if (count != 3)
        return 2;
    each = strtoul(arguments[2], NULL, 10);
    if (strcmp(arguments[1], "eventfd") == 0) {
        wakeup.read_fd = wakeup.write_fd = eventfd(0, EFD_NONBLOCK);
        wakeup.counter = 1;
    } else {
        if (pipe2(fds, O_NONBLOCK))
            return 2;
        wakeup.read_fd = fds[0];
        wakeup.write_fd = fds[1];
    }
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART;
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &often, NULL);
    /* Once alone: what one drain has spoilt, all threads find. */
    on_signal(0);
    aw_drain(&wakeup);
    for (i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, hammer, &made[i]))
            return 2;
    while (seen < THREADS * each) {
        struct pollfd p = {wakeup.read_fd, POLLIN, 0};
        int n = poll(&p, 1, PATIENCE);
        /* As much of signals, two a millisecond: each begins the time anew. */
        if (n < 0 && errno == EINTR && interrupts++ < 2 * PATIENCE)
            continue;
        if (n <= 0) {
            printf("a wake was lost: %lu items seen in %lu turns, flag %d\n", seen, turns, wakeup.flag);
            return 1;
        }
        turns++;
        interrupts = 0;
        aw_drain(&wakeup);
        for (seen = 0, i = 0; i < THREADS; i++)
            seen += __atomic_load_n(&made[i], __ATOMIC_RELAXED);
        now = seen + __atomic_load_n(&made[THREADS], __ATOMIC_RELAXED);
        ended += now == last;
        last = now;
        /* The signals are for the middle of things: without them nobody wakes for what a wake lost. */
        if (seen > THREADS * each / 2)
            setitimer(ITIMER_REAL, &never, NULL);
    }
    for (i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    if (wakeup.written > THREADS * each + made[THREADS]) {
        printf("more writes than wakes\n");
        return 1;
    }
    printf("%lu items, %lu signals, %lu writes, %lu turns, %d for nothing\n", seen, made[THREADS],
           (unsigned long) wakeup.written, turns, ended);
    return 0;
}
