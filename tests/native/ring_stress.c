/* The ring of src/anywire/ipc/ring.h between two threads, and beside a peer that writes nonsense. Compiled and run by
 * test_ring.py, with and without sanitizers.
 *
 *   ring_stress two MESSAGES SEED        two threads, each with a mapping of its own, as two processes have them
 *   ring_stress one MESSAGES SEED        both on one mapping: ThreadSanitizer knows memory by its address, so only here
 *                                        does it see what the two threads share
 *   ring_stress meet SECONDS SEED        two threads; in each round one publishes just as the other goes to sleep for data,
 *                                        then one makes room just as the other goes to sleep for it
 *   ring_stress producer COUNT SEED      this side produces; another process scribbles over all that a consumer may write
 *   ring_stress consumer COUNT SEED      this side consumes; another process scribbles over all that a producer may write
 *                                        until COUNT records were believed and COUNT times something was refused, or
 *                                        the time for that is over
 *
 * Lengths and bytes of each record follow from its number. Both sides sleep on eventfds part of the time. Guard pages
 * surround each mapping. Exits with 0 and a line of counts; 1 and a reason; or as the sanitizer says.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ring.h"

#ifndef PAGE
#define PAGE 4096u
#endif
#define SIZE PAGE               /* the smallest ring that can be mapped twice: it wraps around all the time */
#define CONTROL PAGE
#define EXTENTS 24u
#define EXTENT 64u
#define PATIENCE 20000          /* milliseconds; a wake-up takes microseconds */

_Static_assert(sizeof(aw_control) <= CONTROL && EXTENTS * EXTENT <= CONTROL, "a page each");

static int data_fd, pool_fd, control_fd, bell_p, bell_c;
static uint64_t seed, wanted;

static _Noreturn void fail(const char *what, uint64_t number) {
    fprintf(stderr, "ring_stress: %s (%llu)\n", what, (unsigned long long)number);
    fflush(stderr);
    _exit(1);
}

static uint64_t mix(uint64_t x) {               /* splitmix64, Steele, Lea, Flood 2014 */
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static uint64_t next(uint64_t *state) {
    return *state = mix(*state);
}

static int memfd(unsigned size) {
    int fd = memfd_create("ring_stress", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, size) < 0)
        fail("memfd_create", (uint64_t)errno);
    return fd;
}

/* `size` bytes of `fd`, `times` times one behind the other, between two pages that nobody may touch. */
static char *map(int fd, unsigned size, unsigned times, int protection) {
    char *start = mmap(NULL, size * times + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        fail("mmap", (uint64_t)errno);
    for (unsigned i = 0; i < times; i++)
        if (mmap(start + PAGE + i * size, size, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
            fail("mmap of a memfd", (uint64_t)errno);
    return start + PAGE;
}

static void ring_bell(int bell) {
    if (eventfd_write(bell, 1) < 0)
        fail("eventfd_write", (uint64_t)errno);
}

static void sleep_on(int bell, const char *who, uint64_t number) {
    struct pollfd wait = {bell, POLLIN, 0};
    eventfd_t count;
    if (poll(&wait, 1, PATIENCE) != 1)
        fail(who, number);
    eventfd_read(bell, &count);
}

/* -- two threads ---------------------------------------------------------------------------------------------------- */

static uint32_t length_of(uint64_t number) {
    uint64_t r = mix(seed ^ number * 3);
    uint64_t limit = (r & 15) == 0 ? SIZE / 2 - AW_RECORD : (r & 15) < 4 ? 400 : 40;
    return (uint32_t)((r >> 8) % (limit + 1));
}

static uint32_t kind_of(uint64_t number) {
    return (uint32_t)mix(number);
}

static void fill(char *at, uint32_t length, uint64_t number) {
    uint64_t word = mix(seed + number);
    for (; length >= 8; length -= 8, at += 8, word++)
        memcpy(at, &word, 8);
    memcpy(at, &word, length);
}

static void check(const char *at, uint32_t length, uint64_t number) {
    uint64_t word = mix(seed + number);
    for (; length >= 8; length -= 8, at += 8, word++)
        if (memcmp(at, &word, 8))
            fail("a record's bytes are wrong", number);
    if (memcmp(at, &word, length))
        fail("a record's last bytes are wrong", number);
}

typedef struct {
    aw_producer ring;
    char *pool;                 /* EXTENTS chunks */
    uint64_t slept, rang;
} producing;

typedef struct {
    aw_consumer ring;
    const char *pool;
    uint64_t slept, rang;
} consuming;

static void publish(producing *me) {
    aw_publish(&me->ring);
    if (aw_must_ring(&me->ring)) {
        me->rang++;
        ring_bell(bell_c);
    }
}

static void *produce(void *argument) {
    producing *me = argument;
    aw_producer *p = &me->ring;
    uint64_t random = seed, lent = 0, back = 0;
    for (uint64_t number = 0; number < wanted; number++) {
        uint32_t length = length_of(number), unit;
        int room;
        while ((room = aw_has_room(p, length)) == 0) {
            if (p->published != p->head)
                publish(me);
            if (next(&random) & 3)
                continue;
            room = aw_sleep_for_room(p, length);
            if (room == 0 && next(&random) & 7) {               /* else the send was given up; the flag stays */
                me->slept++;
                sleep_on(bell_p, "the producer slept though there was room, or for ever", number);
                if (next(&random) & 1)
                    aw_awake_with_room(p);
            }
            if (room < 0)
                break;
        }
        if (room < 0)
            fail("the consumer's cursor makes no sense", number);
        while ((room = aw_next_return(p, &unit)) > 0)
            if (unit != back++ % EXTENTS)
                fail("an extent came back out of turn", number);
        if (room < 0)
            fail("the cursor of returns makes no sense", number);
        /* Each record lends an extent when one is free: the consumer reads it, then gives it back. */
        if (lent - back < EXTENTS) {
            fill(me->pool + lent % EXTENTS * EXTENT, EXTENT, lent);
            lent++;
            fill(aw_slot(p), length, number);
            aw_commit(p, kind_of(number) | 1, length);
        } else {
            fill(aw_slot(p), length, number);
            aw_commit(p, kind_of(number) & ~1u, length);
        }
        if (next(&random) & 3)
            publish(me);
    }
    publish(me);
    return NULL;
}

static void *consume(void *argument) {
    consuming *me = argument;
    aw_consumer *c = &me->ring;
    uint64_t random = ~seed, lent = 0;
    for (uint64_t number = 0; number < wanted;) {
        aw_record record;
        int here = aw_peek(c, &record);
        if (here < 0)
            fail("the producer's cursor or record makes no sense", number);
        if (here) {
            if (record.length != length_of(number) || (record.kind | 1) != (kind_of(number) | 1))
                fail("another record than the next", number);
            check(record.data, record.length, number);
            if (record.kind & 1) {
                check(me->pool + lent % EXTENTS * EXTENT, EXTENT, lent);
                aw_return(c, (uint32_t)(lent % EXTENTS));
                lent++;
            }
            aw_advance(c, record.length);
            aw_count_taken(c, 1);
            number++;
            if (next(&random) & 3)
                continue;
        }
        aw_release_records(c);
        if (aw_room_was_wanted(c, !here)) {
            me->rang++;
            ring_bell(bell_p);
        }
        if (here || next(&random) & 3)
            continue;
        if (aw_sleep_for_data(c) == 0 && next(&random) & 7) {   /* else the receive was cancelled; the flag stays */
            me->slept++;
            sleep_on(bell_c, "the consumer slept though there was data, or for ever", number);
            if (next(&random) & 1)
                aw_awake_with_data(c);
        }
    }
    aw_release_records(c);
    if (aw_room_was_wanted(c, 1))
        ring_bell(bell_p);
    return NULL;
}

static void two_threads(int mappings) {
    pthread_t producer, consumer;
    producing p = {.ring = {.size = SIZE}};
    consuming c = {.ring = {.size = SIZE}};
    p.ring.data = map(data_fd, SIZE, 2, PROT_READ | PROT_WRITE);
    p.pool = map(pool_fd, CONTROL, 1, PROT_READ | PROT_WRITE);
    p.ring.control = (aw_control *)map(control_fd, CONTROL, 1, PROT_READ | PROT_WRITE);
    c.ring.data = mappings == 1 ? p.ring.data : map(data_fd, SIZE, 2, PROT_READ);
    c.pool = mappings == 1 ? p.pool : map(pool_fd, CONTROL, 1, PROT_READ);
    c.ring.control = mappings == 1 ? p.ring.control
                                   : (aw_control *)map(control_fd, CONTROL, 1, PROT_READ | PROT_WRITE);
    if (pthread_create(&producer, NULL, produce, &p) || pthread_create(&consumer, NULL, consume, &c))
        fail("pthread_create", (uint64_t)errno);
    pthread_join(producer, NULL);
    pthread_join(consumer, NULL);
    if (atomic_load(&p.ring.control->taken) != wanted || c.ring.tail != p.ring.head)
        fail("the cursors at the end", c.ring.tail);
    printf("messages=%llu bytes=%llu producer: slept=%llu rang=%llu consumer: slept=%llu rang=%llu\n",
           (unsigned long long)wanted, (unsigned long long)p.ring.head, (unsigned long long)p.slept,
           (unsigned long long)p.rang, (unsigned long long)c.slept, (unsigned long long)c.rang);
}

/* -- who goes to sleep and who wakes, at the same moment ------------------------------------------------------------- */

typedef struct {
    _Atomic uint64_t round[2];  /* which round each thread has reached */
    _Atomic int rings, sleeps;  /* what each decided in this round */
    _Atomic int over;
    aw_producer p;
    aw_consumer c;
    uint64_t rounds, rang, awake;
} meeting;

static void reach(meeting *m, int who, uint64_t round) {
    atomic_store(&m->round[who], round);
    for (uint64_t i = 1; atomic_load(&m->round[!who]) < round; i++)
        if (i % 65536 == 0)                                     /* late: a thread that yields isn't there to meet */
            sched_yield();
}

static void dither(uint64_t random) {
    for (uint64_t i = random & 63; i; i--)
        atomic_signal_fence(memory_order_seq_cst);              /* a delay that the compiler keeps */
}

static void *meet_producer(void *argument) {
    meeting *m = argument;
    uint64_t random = seed;
    time_t end = time(NULL) + (time_t)wanted + 1;
    for (uint64_t round = 0; !atomic_load(&m->over); round++) {
        if (round % 64 == 0 && time(NULL) >= end)
            atomic_store(&m->over, 1);                          /* seen by both before the next round */
        memset(aw_slot(&m->p), 1, SIZE / 2 - AW_RECORD);        /* half the ring */
        aw_commit(&m->p, 0, SIZE / 2 - AW_RECORD);
        reach(m, 0, 4 * round + 1);
        dither(next(&random));
        aw_publish(&m->p);
        atomic_store(&m->rings, aw_must_ring(&m->p));
        reach(m, 0, 4 * round + 2);
        if (aw_has_room(&m->p, SIZE / 2 - AW_RECORD) != 1)      /* the other half */
            fail("no room in an empty half", round);
        aw_commit(&m->p, 0, SIZE / 2 - AW_RECORD);
        aw_publish(&m->p);
        reach(m, 0, 4 * round + 3);
        dither(next(&random));
        atomic_store(&m->sleeps, aw_sleep_for_room(&m->p, 8) == 0);
        reach(m, 0, 4 * round + 4);
        aw_awake_with_room(&m->p);
    }
    return NULL;
}

static void *meet_consumer(void *argument) {
    meeting *m = argument;
    aw_record record;
    uint64_t random = ~seed;
    int over = 0;
    for (uint64_t round = 0; !over; round++) {
        reach(m, 1, 4 * round + 1);
        over = atomic_load(&m->over);
        dither(next(&random));
        int sleeps = aw_sleep_for_data(&m->c) == 0;
        reach(m, 1, 4 * round + 2);
        if (sleeps && !atomic_load(&m->rings))
            fail("the consumer sleeps and the producer doesn't ring", round);
        m->rounds++;
        m->awake += !sleeps;
        aw_awake_with_data(&m->c);
        if (aw_peek(&m->c, &record) != 1)
            fail("nothing was published", round);
        aw_advance(&m->c, record.length);
        reach(m, 1, 4 * round + 3);
        dither(next(&random));
        aw_release_records(&m->c);
        int rings = aw_room_was_wanted(&m->c, 1);
        reach(m, 1, 4 * round + 4);
        if (!rings && atomic_load(&m->sleeps))
            fail("the producer sleeps and the consumer doesn't ring", round);
        m->rang += (uint64_t)rings;
        if (aw_peek(&m->c, &record) != 1)
            fail("the second half was not published", round);
        aw_advance(&m->c, record.length);
        aw_release_records(&m->c);
    }
    return NULL;
}

static void meet(void) {
    meeting m = {.p = {.size = SIZE}, .c = {.size = SIZE}};
    pthread_t producer, consumer;
    m.p.data = map(data_fd, SIZE, 2, PROT_READ | PROT_WRITE);
    m.p.control = (aw_control *)map(control_fd, CONTROL, 1, PROT_READ | PROT_WRITE);
    m.c.data = map(data_fd, SIZE, 2, PROT_READ);
    m.c.control = (aw_control *)map(control_fd, CONTROL, 1, PROT_READ | PROT_WRITE);
    if (pthread_create(&producer, NULL, meet_producer, &m) || pthread_create(&consumer, NULL, meet_consumer, &m))
        fail("pthread_create", (uint64_t)errno);
    pthread_join(producer, NULL);
    pthread_join(consumer, NULL);
    printf("rounds=%llu rang=%llu awake=%llu\n", (unsigned long long)m.rounds, (unsigned long long)m.rang,
           (unsigned long long)m.awake);
}

/* -- a hostile peer ------------------------------------------------------------------------------------------------- */

/* A cursor near one that makes sense: random ones would all be refused by the first check. */
static uint64_t near(uint64_t random, uint64_t cursor) {
    static const uint64_t steps[] = {0, 8, 16, SIZE / 2, SIZE - 8, SIZE, SIZE + 8, 2 * SIZE, 1, 4,
                                     (uint64_t)1 << 32, (uint64_t)1 << 63};
    uint64_t step = steps[random % (sizeof steps / sizeof *steps)];
    return random & 64 ? cursor + step : random & 128 ? cursor - step : cursor + (random >> 8) % SIZE / 8 * 8;
}

static void scribble(char *data, aw_control *control) {
    uint64_t random = ~seed;
    for (;;) {
        uint64_t r = next(&random), value = next(&random);
        /* Volatile: these stores are the point, though nobody here reads them. */
        volatile uint64_t *words = (volatile uint64_t *)control;
        switch (r & 7) {
        case 0:
            words[(r >> 8) % (CONTROL / 8)] = value;
            break;
        case 1:
            ((volatile unsigned char *)control)[(r >> 8) % CONTROL] = (unsigned char)value;
            break;
        case 2:
            atomic_store_explicit(&control->returned, near(value, atomic_load_explicit(&control->returned,
                                  memory_order_relaxed)), memory_order_relaxed);
            break;
        default:
            if (data) {                                         /* a producer: its cursor follows the victim's */
                uint64_t tail = atomic_load_explicit(&control->tail, memory_order_relaxed);
                uint64_t length = r & 16 ? value % (2 * SIZE) : value % 64;
                for (unsigned i = 0; i < (r >> 8) % 64; i++)
                    *(volatile uint64_t *)(data + next(&random) % (SIZE / 8) * 8) = r & 32 ? next(&random) : length;
                *(volatile uint64_t *)(data + (tail & (SIZE - 1) & ~7ull)) = r & 64 ? value : length;
                atomic_store_explicit(&control->head, near(value, tail), memory_order_relaxed);
            } else {
                uint64_t head = atomic_load_explicit(&control->head, memory_order_relaxed);
                atomic_store_explicit(&control->tail, near(value, head), memory_order_relaxed);
            }
        }
    }
}

static pid_t peer(int producer) {
    pid_t child = fork();
    if (child < 0)
        fail("fork", (uint64_t)errno);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        scribble(producer ? map(data_fd, SIZE, 1, PROT_READ | PROT_WRITE) : NULL,
                 (aw_control *)map(control_fd, CONTROL, 1, PROT_READ | PROT_WRITE));
    }
    return child;
}

static void stop(pid_t child) {
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

/* Until enough was believed and enough refused, or the time is up: beside other work the peer has few turns. */
static int goes_on(uint64_t round, uint64_t believed, uint64_t refused) {
    static time_t end;
    if (!end)
        end = time(NULL) + 10 + (time_t)(wanted / 25000);
    if (round % 1024 == 0) {
        sched_yield();                                          /* with one CPU the peer needs its turn */
        if (time(NULL) > end && believed && refused)
            return 0;
    }
    return believed < wanted || refused < wanted;
}

static void consume_nonsense(void) {
    aw_consumer c = {.size = SIZE, .data = map(data_fd, SIZE, 2, PROT_READ),
                     .control = (aw_control *)map(control_fd, CONTROL, 1, PROT_READ | PROT_WRITE)};
    uint64_t random = seed, refused = 0, records = 0, waits = 0, sum = 0, round = 0;
    pid_t child = peer(1);
    for (; goes_on(round, records, refused); round++) {
        aw_record record = {0, 0, NULL};
        int here = aw_peek(&c, &record);
        if (c.head_seen - c.tail > SIZE || c.head_seen % AW_RECORD)
            fail("a head was believed that can't be", c.head_seen - c.tail);
        if (here > 0) {
            if (record.length > SIZE - AW_RECORD || record.data < c.data || record.data + record.length > c.data + 2 * SIZE)
                fail("a record outside the ring", record.length);
            for (uint32_t i = 0; i < record.length; i++)
                sum += (unsigned char)record.data[i];
            aw_advance(&c, record.length);
            aw_release_records(&c);
            aw_count_taken(&c, 1);
            aw_return(&c, record.kind);
            records++;
        } else if (here == 0) {
            waits += aw_sleep_for_data(&c) == 0;
            if (next(&random) & 1)
                aw_awake_with_data(&c);
        } else {                                                /* the connection is lost; here the next one begins */
            refused++;
            c.head_seen = c.tail = next(&random) & 7 ? atomic_load(&c.control->head) & ~7ull : next(&random) & ~7ull;
            aw_release_records(&c);
        }
        waits += (uint64_t)aw_room_was_wanted(&c, here == 0);
    }
    stop(child);
    printf("rounds=%llu records=%llu refused=%llu waits=%llu sum=%llu\n", (unsigned long long)round,
           (unsigned long long)records, (unsigned long long)refused, (unsigned long long)waits, (unsigned long long)sum);
}

static void produce_nonsense(void) {
    aw_producer p = {.size = SIZE, .data = map(data_fd, SIZE, 2, PROT_READ | PROT_WRITE),
                     .control = (aw_control *)map(control_fd, CONTROL, 1, PROT_READ | PROT_WRITE)};
    uint64_t random = seed, refused = 0, records = 0, waits = 0, returns = 0, round = 0;
    pid_t child = peer(0);
    for (; goes_on(round, records, refused); round++) {
        uint32_t length = (uint32_t)(next(&random) % (SIZE / 2 - AW_RECORD + 1)), unit;
        int room = aw_has_room(&p, length), back;
        if (p.head - p.tail_seen > SIZE || p.tail_seen > p.published)
            fail("a tail was believed that can't be", p.head - p.tail_seen);
        if (room > 0) {
            char *at = aw_slot(&p);
            if (at < p.data + AW_RECORD || at + length > p.data + 2 * SIZE)
                fail("a slot outside the ring", length);
            memset(at, (int)length, length);
            aw_commit(&p, (uint32_t)round, length);
            records++;
            if (next(&random) & 1) {
                aw_publish(&p);
                waits += (uint64_t)aw_must_ring(&p);
            }
        } else if (room == 0) {
            aw_publish(&p);
            room = aw_sleep_for_room(&p, length);
            waits += room == 0;
            if (next(&random) & 1)
                aw_awake_with_room(&p);
        }
        if ((back = aw_next_return(&p, &unit)) > 0)
            returns++;
        if (room < 0 || back < 0) {                             /* the connection is lost; here the next one begins */
            refused++;
            p.returned_seen = next(&random) >> 1;
            p.head = p.published = p.tail_seen = next(&random) >> 1 & ~7ull;
            atomic_store_explicit(&p.control->returned, p.returned_seen, memory_order_relaxed);
            atomic_store_explicit(&p.control->tail, p.tail_seen, memory_order_relaxed);
            aw_publish(&p);
        }
    }
    stop(child);
    printf("rounds=%llu records=%llu refused=%llu waits=%llu returns=%llu\n", (unsigned long long)round,
           (unsigned long long)records, (unsigned long long)refused, (unsigned long long)waits, (unsigned long long)returns);
}

int main(int argc, char **argv) {
    if (argc != 4)
        fail("usage: ring_stress two|one|meet|producer|consumer COUNT SEED", 0);
    wanted = strtoull(argv[2], NULL, 10);
    seed = mix(strtoull(argv[3], NULL, 10));
    data_fd = memfd(SIZE);
    pool_fd = memfd(CONTROL);
    control_fd = memfd(CONTROL);
    bell_p = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    bell_c = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (bell_p < 0 || bell_c < 0)
        fail("eventfd", (uint64_t)errno);
    if (!strcmp(argv[1], "two"))
        two_threads(2);
    else if (!strcmp(argv[1], "one"))
        two_threads(1);
    else if (!strcmp(argv[1], "meet"))
        meet();
    else if (!strcmp(argv[1], "producer"))
        produce_nonsense();
    else if (!strcmp(argv[1], "consumer"))
        consume_nonsense();
    else
        fail("no such mode", 0);
    return 0;
}
