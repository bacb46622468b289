/* A lock in shared memory that survives the death of its owner: a robust futex, without the C library's mutex.
 *
 * pthread's robust mutexes would do, but for one thing: a thread that waits for one can't be interrupted, so Ctrl-C
 * would not reach a worker that waits for its turn (PEP 475). So this speaks the kernel's own protocol, the one that
 * glibc and musl speak (robust-futexes and robust-futex-ABI in the kernel's documentation, get_robust_list(2)): each
 * thread has a list of the locks it holds, and when it dies the kernel walks the list, sets FUTEX_OWNER_DIED in each
 * word that names the thread, and wakes one waiter. `list_op_pending` names the lock that is being taken or released,
 * and covers the moments in which a lock is held and not yet (or no longer) listed, and in which a woken waiter has
 * not taken it yet.
 *
 * The C library registered the list's head and the distance from a list node to its futex word; both are asked from the
 * kernel. Nodes keep a pointer to their predecessor right before them, as both C libraries do, so that their mutexes
 * and these locks can share a list. Locks are released in the reverse of the order in which they were taken.
 *
 * Owners are thread ids: the processes must share a PID namespace, as with pthread's.
 */
#ifndef ANYWIRE_MULTIPROCESSING_ROBUST_H
#define ANYWIRE_MULTIPROCESSING_ROBUST_H

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* What operations answer. DIED: it worked, and what the lock protects may be half done. */
enum { MP_OK = 0, MP_DIED, MP_BUSY, MP_TIMEDOUT, MP_INTERRUPTED, MP_DEADLOCK, MP_ENDED, MP_CORRUPT, MP_SYSTEM };

#define MP_FOREVER INT64_MAX

/* One cache line. The word lies at node + futex_offset (-32 with glibc, -28 with musl, on 64 bits). */
typedef struct {
    char before[24];
    void *prev;
    void *node;                         /* `next` of the kernel's struct robust_list */
    char after[24];
} mp_lock;

typedef struct {
    struct robust_list_head *head;
    uint32_t tid;
} mp_thread;

static __thread mp_thread mp_self;
static long mp_futex_offset;

static inline int64_t mp_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void mp_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#else
    __asm__ volatile("" ::: "memory");
#endif
}

/* Wait while *word is `value`, at most until `deadline`. 0, or the errno (EAGAIN: it was another value). */
static int mp_futex_wait(uint32_t *word, uint32_t value, int64_t deadline)
{
    struct timespec t, *timeout = NULL;
    if (deadline != MP_FOREVER) {       /* FUTEX_WAIT_BITSET takes an absolute time on the monotonic clock */
        t.tv_sec = deadline / 1000000000;
        t.tv_nsec = deadline % 1000000000;
        timeout = &t;
    }
    if (syscall(SYS_futex, word, FUTEX_WAIT_BITSET, value, timeout, NULL, FUTEX_BITSET_MATCH_ANY) == 0)
        return 0;
    return errno;
}

/* How many were woken. */
static inline int mp_futex_wake(uint32_t *word, int count)
{
    return (int)syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
}

static void mp_forget_thread(void)
{
    mp_self.head = NULL;                /* a forked child's only thread has a new id */
}

/* Learn this thread's id and list. 0, or an errno: a kernel or sandbox without robust futexes. */
static int mp_know_thread(void)
{
    static int forks;
    struct robust_list_head *head = NULL;
    size_t length = 0;
    if (!__atomic_exchange_n(&forks, 1, __ATOMIC_RELAXED))
        pthread_atfork(NULL, NULL, mp_forget_thread);
    if (syscall(SYS_get_robust_list, 0, &head, &length) != 0)
        return errno;
    if (head == NULL) {                 /* musl registers the list when a thread takes its first robust mutex */
        pthread_mutexattr_t attributes;
        pthread_mutex_t mutex;
        pthread_mutexattr_init(&attributes);
        pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
        pthread_mutex_init(&mutex, &attributes);
        pthread_mutex_lock(&mutex);
        pthread_mutex_unlock(&mutex);
        pthread_mutex_destroy(&mutex);
        if (syscall(SYS_get_robust_list, 0, &head, &length) != 0)
            return errno;
    }
    if (head == NULL || head->futex_offset < -(long)offsetof(mp_lock, node) || head->futex_offset > -16)
        return ENOSYS;
    __atomic_store_n(&mp_futex_offset, head->futex_offset, __ATOMIC_RELAXED);     /* the same in each thread */
    mp_self.tid = (uint32_t)syscall(SYS_gettid);
    mp_self.head = head;
    return 0;
}

static inline uint32_t *mp_word(mp_lock *lock)
{
    return (uint32_t *)((char *)&lock->node + __atomic_load_n(&mp_futex_offset, __ATOMIC_RELAXED));
}

/* The kernel reads the list when this thread has ended, so it sees the stores in the order in which the thread made
 * them: only the compiler must be kept from changing it. */
#define MP_IN_ORDER() __asm__ volatile("" ::: "memory")

static inline void mp_listed(mp_lock *lock)
{
    struct robust_list_head *head = mp_self.head;
    void *next = head->list.next;
    lock->prev = &head->list;
    lock->node = next;
    if (next != (void *)&head->list)
        ((void **)next)[-1] = &lock->node;
    MP_IN_ORDER();
    head->list.next = (struct robust_list *)&lock->node;
    MP_IN_ORDER();
    head->list_op_pending = NULL;
}

static inline int mp_held(mp_lock *lock)
{
    return mp_self.head != NULL && (__atomic_load_n(mp_word(lock), __ATOMIC_RELAXED) & FUTEX_TID_MASK) == mp_self.tid;
}

/* Whether its owner died and nobody has taken it since. */
static inline int mp_orphan(mp_lock *lock)
{
    return (__atomic_load_n(mp_word(lock), __ATOMIC_RELAXED) & FUTEX_OWNER_DIED) != 0;
}

static inline int mp_taken(mp_lock *lock)
{
    return (__atomic_load_n(mp_word(lock), __ATOMIC_RELAXED) & FUTEX_TID_MASK) != 0;
}

/* Take it if it is free: MP_OK, MP_DIED, MP_BUSY, MP_DEADLOCK (this thread holds it), or MP_SYSTEM. `also` are bits to
 * leave in the word. Acquire: what the previous owner wrote before its release is seen. */
static inline int mp_try(mp_lock *lock, uint32_t also)
{
    uint32_t *word;
    uint32_t old = 0;
    int error;
    if (__builtin_expect(mp_self.head == NULL, 0) && (error = mp_know_thread()) != 0) {
        errno = error;
        return MP_SYSTEM;
    }
    word = mp_word(lock);
    mp_self.head->list_op_pending = (struct robust_list *)&lock->node;
    MP_IN_ORDER();
    while (1) {
        if (__atomic_compare_exchange_n(word, &old, mp_self.tid | also | (old & FUTEX_WAITERS), 0,
                                        __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
            mp_listed(lock);
            return old & FUTEX_OWNER_DIED ? MP_DIED : MP_OK;
        }
        if (old & FUTEX_TID_MASK)
            break;
    }
    MP_IN_ORDER();
    mp_self.head->list_op_pending = NULL;
    return (old & FUTEX_TID_MASK) == mp_self.tid ? MP_DEADLOCK : MP_BUSY;
}

/* Take it, waiting until `deadline` (nanoseconds of the monotonic clock): as mp_try, or MP_TIMEDOUT, MP_INTERRUPTED.
 * `spins`: how often to look before sleeping. */
static int mp_acquire(mp_lock *lock, int64_t deadline, int spins)
{
    uint32_t *word, old, slept = 0;
    int result = mp_try(lock, 0), error;
    if (result != MP_BUSY)
        return result;
    word = mp_word(lock);
    for (; spins > 0; spins--) {
        mp_pause();
        old = __atomic_load_n(word, __ATOMIC_RELAXED);
        if (!(old & FUTEX_TID_MASK) && (result = mp_try(lock, 0)) != MP_BUSY)
            return result;
    }
    /* From here on as the C libraries do it: the lock stays pending, so that a wake-up that reaches a thread which dies
     * before it takes the lock is passed on by the kernel; and who has slept leaves FUTEX_WAITERS set, for there may be
     * others. */
    mp_self.head->list_op_pending = (struct robust_list *)&lock->node;
    MP_IN_ORDER();
    while (1) {
        old = __atomic_load_n(word, __ATOMIC_RELAXED);
        if (!(old & FUTEX_TID_MASK)) {
            if (__atomic_compare_exchange_n(word, &old, mp_self.tid | slept | (old & FUTEX_WAITERS), 0,
                                            __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
                mp_listed(lock);
                return old & FUTEX_OWNER_DIED ? MP_DIED : MP_OK;
            }
            continue;
        }
        if (!(old & FUTEX_WAITERS) && !__atomic_compare_exchange_n(word, &old, old | FUTEX_WAITERS, 0,
                                                                   __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            continue;
        error = mp_futex_wait(word, old | FUTEX_WAITERS, deadline);
        slept = FUTEX_WAITERS;
        if (error == ETIMEDOUT || error == EINTR)       /* not woken: no wake-up is lost by leaving */
            break;
    }
    MP_IN_ORDER();
    mp_self.head->list_op_pending = NULL;
    return error == EINTR ? MP_INTERRUPTED : MP_TIMEDOUT;
}

/* Release: what was written under the lock is seen by the next owner. It must be the last one that was taken. */
static inline void mp_release(mp_lock *lock)
{
    struct robust_list_head *head = mp_self.head;
    uint32_t *word = mp_word(lock), own = mp_self.tid;
    void *next = lock->node;
    head->list_op_pending = (struct robust_list *)&lock->node;
    MP_IN_ORDER();
    head->list.next = next;
    if (next != (void *)&head->list)
        ((void **)next)[-1] = &head->list;
    MP_IN_ORDER();
    if (__builtin_expect(!__atomic_compare_exchange_n(word, &own, 0, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED), 0)) {
        /* Somebody sleeps. FUTEX_WAITERS stays until nobody does: another thread may take the lock before the one that
         * is woken, which may die before it can say that there are more; with the bit gone they would sleep for ever.
         * (The C libraries clear it here, and have that gap.) */
        __atomic_store_n(word, FUTEX_WAITERS, __ATOMIC_RELEASE);
        if (mp_futex_wake(word, 1) == 0) {
            own = FUTEX_WAITERS;
            __atomic_compare_exchange_n(word, &own, 0, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
        }
    }
    MP_IN_ORDER();
    head->list_op_pending = NULL;
}

#endif
