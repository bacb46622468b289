/* Waiting for a System V queue, which has no descriptor that could be polled.
 *
 * A helper's thread waits inside msgrcv(2) or msgsnd(2) and rings a bell, an eventfd(2). It is plain C and never has the GIL.
 *
 * - For a message: msgrcv of no bytes, without MSG_NOERROR, waits until there is one, and fails with E2BIG; the message stays
 *   where it is (ipc/msg.c of the kernel: do_msgrcv, and pipelined_send for those that wait). Only an empty message is taken.
 * - For room: no call waits for that alone, so the thread sends the message.
 *
 * A job is ended by a signal, which makes the call return EINTR: it has done nothing then, or all (signal(7)). One that
 * comes just before the thread is inside the call is lost, so it is sent until the thread has answered. */
#ifndef ANYWIRE_WIRES_SYSV_WAITING_H
#define ANYWIRE_WIRES_SYSV_WAITING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { ANYWIRE_NO_JOB, ANYWIRE_COMING, ANYWIRE_SENDING };
enum { ANYWIRE_NOTHING, ANYWIRE_READY, ANYWIRE_TAKEN, ANYWIRE_SENT, ANYWIRE_FAILED };

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t called, answered;
    pthread_t thread;
    int started;
    int quit;
    int job;                    /* what it does, or is to do */
    int stop;                   /* it is to leave the call without having done anything, if that is still possible */
    int outcome;
    int error;                  /* errno of ANYWIRE_FAILED */
    long taken;                 /* type of the empty message of ANYWIRE_TAKEN */
    int bell;
    int id;
    long type;                  /* COMING: which messages, as msgrcv's */
    const void* message;        /* SENDING; it must not change meanwhile */
    size_t size;
} anywire_helper;

static inline void anywire_ring(int bell) {
    uint64_t one = 1;
    while (write(bell, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static inline void* anywire_helper_run(void* given) {
    anywire_helper* h = given;
    struct { long type; char none[8]; } empty = { 0, { 0 } };
    pthread_mutex_lock(&h->lock);
    while (!h->quit) {
        if (h->job == ANYWIRE_NO_JOB) {
            pthread_cond_wait(&h->called, &h->lock);
            continue;
        }
        while (h->outcome == ANYWIRE_NOTHING && !h->stop) {
            int coming = h->job == ANYWIRE_COMING, e;
            ssize_t done;
            pthread_mutex_unlock(&h->lock);
            done = coming ? msgrcv(h->id, &empty, 0, h->type, 0) : msgsnd(h->id, h->message, h->size, 0);
            e = errno;
            pthread_mutex_lock(&h->lock);
            if (done >= 0) {
                h->outcome = coming ? ANYWIRE_TAKEN : ANYWIRE_SENT;
                h->taken = empty.type;
            } else if (coming && e == E2BIG) {
                h->outcome = ANYWIRE_READY;
            } else if (e != EINTR) {
                h->outcome = ANYWIRE_FAILED;
                h->error = e;
            }
        }
        /* Under the lock: who ends the job may close the bell as soon as it is over. */
        if (!h->stop)
            anywire_ring(h->bell);
        h->job = ANYWIRE_NO_JOB;
        pthread_cond_signal(&h->answered);
    }
    pthread_mutex_unlock(&h->lock);
    return NULL;
}

static inline void anywire_helper_make(anywire_helper* h) {
    pthread_condattr_t monotonic;
    memset(h, 0, sizeof *h);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->called, NULL);
    pthread_cond_init(&h->answered, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

/* Have a job done whose fields are set; there must be none. Its thread has all signals blocked but `number`, which ends
 * its calls. 0, or the errno of why there is no thread. */
static inline int anywire_helper_begin(anywire_helper* h, int job, int number) {
    int failed = 0;
    pthread_mutex_lock(&h->lock);
    h->outcome = ANYWIRE_NOTHING;
    h->stop = 0;
    h->job = job;
    if (h->started) {
        pthread_cond_signal(&h->called);
    } else {
        pthread_attr_t attributes;
        sigset_t all, before;
        size_t stack = 128 * 1024;
        sigfillset(&all);
        sigdelset(&all, number);
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, stack < (size_t) PTHREAD_STACK_MIN ? (size_t) PTHREAD_STACK_MIN : stack);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        failed = pthread_create(&h->thread, &attributes, anywire_helper_run, h);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
        if (failed)
            h->job = ANYWIRE_NO_JOB;
        else
            h->started = 1;
    }
    pthread_mutex_unlock(&h->lock);
    return failed;
}

static inline int anywire_helper_busy(anywire_helper* h) {
    int busy;
    pthread_mutex_lock(&h->lock);
    busy = h->job != ANYWIRE_NO_JOB;
    pthread_mutex_unlock(&h->lock);
    return busy;
}

/* What came of the last job, once; one that is under way is ended now. */
static inline int anywire_helper_end(anywire_helper* h, int number) {
    int outcome;
    pthread_mutex_lock(&h->lock);
    while (h->job != ANYWIRE_NO_JOB) {
        struct timespec until;
        h->stop = 1;
        pthread_kill(h->thread, number);
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += 1000000;
        if (until.tv_nsec >= 1000000000) {
            until.tv_nsec -= 1000000000;
            until.tv_sec++;
        }
        pthread_cond_timedwait(&h->answered, &h->lock, &until);
    }
    outcome = h->outcome;
    h->outcome = ANYWIRE_NOTHING;
    pthread_mutex_unlock(&h->lock);
    return outcome;
}

/* End the thread; no job is under way. */
static inline void anywire_helper_quit(anywire_helper* h) {
    if (h->started) {
        pthread_mutex_lock(&h->lock);
        h->quit = 1;
        pthread_cond_signal(&h->called);
        pthread_mutex_unlock(&h->lock);
        pthread_join(h->thread, NULL);
        h->started = 0;
    }
    pthread_cond_destroy(&h->called);
    pthread_cond_destroy(&h->answered);
    pthread_mutex_destroy(&h->lock);
}

/* ---- Calls on the caller's own thread that another one may end: it must know whether the thread is inside. ---- */

/* The calling thread's number for tgkill(2), looked up once a thread; the signal is let through to it from then on. */
static inline int anywire_own_thread(unsigned generation, int number) {
    static __thread int thread;
    static __thread unsigned of;
    if (thread == 0 || of != generation) {      /* after fork(2) the thread has another number */
        sigset_t let;
        sigemptyset(&let);
        sigaddset(&let, number);
        pthread_sigmask(SIG_UNBLOCK, &let, NULL);
        thread = (int) syscall(SYS_gettid);
        of = generation;
    }
    return thread;
}

static inline void anywire_enter(int* inside, int thread) { __atomic_store_n(inside, thread, __ATOMIC_SEQ_CST); }
static inline int anywire_inside(int* inside) { return __atomic_load_n(inside, __ATOMIC_SEQ_CST); }

static inline ssize_t anywire_receive_inside(int* inside, int id, void* message, size_t size, long type) {
    ssize_t n = msgrcv(id, message, size, type, 0);
    int e = errno;
    __atomic_store_n(inside, 0, __ATOMIC_SEQ_CST);
    errno = e;
    return n;
}

static inline int anywire_send_inside(int* inside, int id, const void* message, size_t size) {
    int done = msgsnd(id, message, size, 0);
    int e = errno;
    __atomic_store_n(inside, 0, __ATOMIC_SEQ_CST);
    errno = e;
    return done;
}

static inline void anywire_signal(int thread, int number) { syscall(SYS_tgkill, getpid(), thread, number); }

/* Whether the queue has messages, of any type; also if that can't be told. */
static inline int anywire_has_some(int id) {
    struct msqid_ds status;
    return msgctl(id, IPC_STAT, &status) < 0 || status.msg_qnum > 0;
}

/* 1: no queue has this id any more. Who may not read its status is told so only while there is one. */
static inline int anywire_gone(int id) {
    struct msqid_ds status;
    return msgctl(id, IPC_STAT, &status) < 0 && (errno == EIDRM || errno == EINVAL);
}

#endif
