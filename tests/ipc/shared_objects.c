/* The other side of the tests of anywire.ipc: the C library's own calls on the same objects. What is asked is argv[1]. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void must(int good, const char *what) {
    if (!good) {
        perror(what);
        exit(1);
    }
}

static char *memory(const char *name) {
    struct stat status;
    int fd = shm_open(name, O_RDWR, 0);
    must(fd >= 0 && !fstat(fd, &status), name);
    char *at = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    must(at != MAP_FAILED, "mmap");
    close(fd);
    return at;
}

/* Take a unit of one, give one to the other. */
static int answer(sem_t *from, sem_t *to, int count) {
    while (count--) {
        must(!sem_wait(from), "sem_wait");
        must(!sem_post(to), "sem_post");
    }
    return 0;
}

/* Locks: the C library's object lies 64 bytes behind the start. */
static void *lock_at(const char *name, const char *magic) {
    char *at = memory(name);
    must(!memcmp(at, magic, 8), magic);
    return at + 64;
}

static int lock_robust(pthread_mutex_t *m) {
    int e = pthread_mutex_lock(m);
    if (e == EOWNERDEAD)
        pthread_mutex_consistent(m);
    return e;
}

static void must_not(int e, const char *what) {
    errno = e;
    must(!e, what);
}

int main(int count, char **a) {
    const char *what = count > 1 ? a[1] : "";
    if (!strcmp(what, "answer-named") && count == 5) {
        sem_t *from = sem_open(a[2], 0), *to = sem_open(a[3], 0);
        must(from != SEM_FAILED && to != SEM_FAILED, "sem_open");
        return answer(from, to, atoi(a[4]));
    }
    if (!strcmp(what, "answer-placed") && count == 6) {
        char *at = memory(a[2]);
        return answer((sem_t *)(at + atoi(a[3])), (sem_t *)(at + atoi(a[4])), atoi(a[5]));
    }
    if (!strcmp(what, "make-named") && count == 4) {
        must(sem_open(a[2], O_CREAT | O_EXCL, 0600, (unsigned)atoi(a[3])) != SEM_FAILED, "sem_open");
        return 0;
    }
    if (!strcmp(what, "make-placed") && count == 5) {
        must(!sem_init((sem_t *)(memory(a[2]) + atoi(a[3])), 1, (unsigned)atoi(a[4])), "sem_init");
        return 0;
    }
    if (!strcmp(what, "turn-round") && count == 3) {
        struct stat status;
        char *at = memory(a[2]), first = at[0];
        at[0] = at[1];
        at[1] = first;
        must(!fstat(shm_open(a[2], O_RDONLY, 0), &status), "fstat");
        return printf("%ld\n", (long)status.st_size) < 0;
    }
    if (!strcmp(what, "make-memory") && count == 4) {
        int fd = shm_open(a[2], O_RDWR | O_CREAT | O_EXCL, 0600);
        must(fd >= 0 && !ftruncate(fd, atoi(a[3])), a[2]);
        char *at = memory(a[2]);
        for (int i = 0; i < atoi(a[3]); i++)
            at[i] = (char)i;
        return 0;
    }
    if (!strcmp(what, "count-locked") && count == 5) {          /* the counter lies in memory of its own */
        pthread_mutex_t *m = lock_at(a[2], "AWMUTEX1");
        volatile uint64_t *counter = (uint64_t *)memory(a[3]);
        for (int i = atoi(a[4]); i; i--) {
            must_not(lock_robust(m), "lock");
            *counter = *counter + 1;
            must_not(pthread_mutex_unlock(m), "unlock");
        }
        return 0;
    }
    if (!strcmp(what, "die-locked") && count == 3) {
        must_not(lock_robust(lock_at(a[2], "AWMUTEX1")), "lock");
        return raise(SIGKILL);
    }
    if (!strcmp(what, "lock-after-death") && count == 3) {
        pthread_mutex_t *m = lock_at(a[2], "AWMUTEX1");
        printf("%d ", lock_robust(m) == EOWNERDEAD);
        return printf("%d\n", pthread_mutex_unlock(m)) < 0;
    }
    if (!strcmp(what, "answer-condition") && count == 6) {      /* waits until the counter is odd, makes it even */
        pthread_mutex_t *m = lock_at(a[2], "AWMUTEX1");
        pthread_cond_t *c = lock_at(a[3], "AWCOND_1");
        volatile uint64_t *counter = (uint64_t *)memory(a[4]);
        must_not(pthread_mutex_lock(m), "lock");
        for (int i = atoi(a[5]); i; i--) {
            while (*counter % 2 == 0)
                must_not(pthread_cond_wait(c, m), "wait");
            *counter = *counter + 1;
            must_not(pthread_cond_broadcast(c), "broadcast");
        }
        must_not(pthread_mutex_unlock(m), "unlock");
        return 0;
    }
    if (!strcmp(what, "count-written") && count == 5) {
        pthread_rwlock_t *l = lock_at(a[2], "AWRWLK_1");
        volatile uint64_t *counter = (uint64_t *)memory(a[3]);
        for (int i = atoi(a[4]); i; i--) {
            must_not(pthread_rwlock_wrlock(l), "wrlock");
            *counter = *counter + 1;
            must_not(pthread_rwlock_unlock(l), "unlock");
        }
        return 0;
    }
    if (!strcmp(what, "size-of-sem_t"))
        return printf("%zu\n", sizeof(sem_t)) < 0;
    fprintf(stderr, "shared_objects: %s?\n", what);
    return 2;
}
