/* The limit that shared-memory wires are compared with: a ring in C, one producer and one consumer each way, both sides
 * spinning, nothing checked, nobody ever asleep.
 *
 *     shm_ring SIZE SECONDS echo|flow copy|zero SERVER_CORE CLIENT_CORE
 *
 * Cells of SIZE bytes in an area of 8 MiB, from 2 to 1024 of them (small messages then stay in the cache). `copy`: the
 * sender copies each message into its cell, the receiver out of it. `zero`: each touches the first byte only. echo counts
 * round trips, flow messages. Prints one JSON object: rate in messages a second, MB/s one way, CPU µs of both processes
 * for one message.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define AREA (8u << 20)
#define LINE 128

typedef struct {
    _Alignas(LINE) _Atomic uint64_t head;       /* messages written */
    _Alignas(LINE) _Atomic uint64_t tail;       /* messages read */
    _Alignas(LINE) char cells[];
} ring;

typedef struct {                                /* one side's view of a ring */
    ring *shared;
    uint64_t at, seen;                          /* its own cursor; the other's, as it last saw it */
} end;

static size_t size, cell, cells;
static int copies;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static void put(end *e, const char *message) {
    while (e->at - e->seen == cells) {
        e->seen = atomic_load_explicit(&e->shared->tail, memory_order_acquire);
        if (e->at - e->seen == cells)
            relax();
    }
    char *to = e->shared->cells + e->at % cells * cell;
    if (copies)
        memcpy(to, message, size);
    else
        *to = *message;
    atomic_store_explicit(&e->shared->head, ++e->at, memory_order_release);
}

static void get(end *e, char *message) {
    while (e->at == e->seen) {
        e->seen = atomic_load_explicit(&e->shared->head, memory_order_acquire);
        if (e->at == e->seen)
            relax();
    }
    const char *from = e->shared->cells + e->at % cells * cell;
    if (copies)
        memcpy(message, from, size);
    else
        *message = *from;
    atomic_store_explicit(&e->shared->tail, ++e->at, memory_order_release);
}

static double now(int clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void pin(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    if (sched_setaffinity(0, sizeof set, &set)) {
        perror("sched_setaffinity");
        exit(1);
    }
}

static ring *make(void) {
    void *at = mmap(NULL, sizeof(ring) + cell * cells, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE,
                    -1, 0);
    if (at == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return at;
}

int main(int argc, char **argv) {
    if (argc != 7) {
        fprintf(stderr, "usage: shm_ring SIZE SECONDS echo|flow copy|zero SERVER_CORE CLIENT_CORE\n");
        return 2;
    }
    size = strtoul(argv[1], NULL, 10);
    double seconds = atof(argv[2]);
    int echo = !strcmp(argv[3], "echo");
    copies = !strcmp(argv[4], "copy");
    cell = (size + 63) / 64 * 64;
    cells = AREA / cell < 2 ? 2 : AREA / cell > 1024 ? 1024 : AREA / cell;
    ring *there = make(), *back = make();
    char *message = aligned_alloc(64, cell);
    memset(message, 0, cell);

    /* A message whose first byte is 1 is the last one; it is answered in both modes. */
    pid_t server = fork();
    if (server == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(atoi(argv[5]));
        end in = {.shared = there}, out = {.shared = back};
        do {
            get(&in, message);
            if (echo || *message)
                put(&out, message);
        } while (!*message);
        _exit(0);
    }
    pin(atoi(argv[6]));
    end in = {.shared = back}, out = {.shared = there};
    uint64_t often = size <= 4096 ? 63 : 0, count = 0;      /* how often it looks at the clock */
    double began = 0, until = now(CLOCK_MONOTONIC) + 0.05, cpu = 0;
    for (int warm = 1;; ) {
        put(&out, message);
        if (echo)
            get(&in, message);
        count++;
        if (count & often)
            continue;
        double time = now(CLOCK_MONOTONIC);
        if (time < until)
            continue;
        if (!warm)
            break;
        warm = 0;
        count = 0;
        began = now(CLOCK_MONOTONIC);
        cpu = now(CLOCK_PROCESS_CPUTIME_ID);
        until = began + seconds;
    }
    *message = 1;
    put(&out, message);
    do
        get(&in, message);
    while (!*message);
    count++;
    double took = now(CLOCK_MONOTONIC) - began;
    cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    int status;
    waitpid(server, &status, 0);
    /* The server spins as long as the client. */
    printf("{\"rate\": %.1f, \"mb_s\": %.2f, \"cpu_us\": %.4f}\n", count / took, count * size / took / 1e6,
           2 * cpu / count * 1e6);
    return status != 0;
}
