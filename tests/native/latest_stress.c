/* A broadcast of mode latest (src/anywire/ipc/latest.h) between two threads: a writer that waits for nobody, and a reader
 * that it laps. Compiled and run by test_latest_ring.py, with and without sanitizers.
 *
 *   latest_stress one MESSAGES SEED      both threads on one mapping, for ThreadSanitizer
 *   latest_stress two MESSAGES SEED      each with a mapping of its own, as two processes have them
 *
 * Lengths and bytes of each record follow from its number. Records in the ring are read and then validated; extents are
 * pinned, and read by ordinary loads: ThreadSanitizer must see no race there. The reader holds some for a while. What it
 * got and what it lost must be all. Exits with 0 and a line of counts; 1 and a reason.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "anywire/ipc/latest.h"

#ifndef PAGE
#define PAGE 4096u
#endif
#define SIZE PAGE
#define EXTENTS 12u
#define EXTENT 256u
#define INDEX 512u              /* more than records fit into the ring */
#define HELD 4u                 /* extents that the reader keeps for a while */

enum { INLINE = 8, IN_POOL = 9, END = 5 };

static int data_fd, pool_fd, control_fd;
static uint64_t seed, wanted;

static _Noreturn void fail(const char *what, uint64_t number) {
    fprintf(stderr, "latest_stress: %s (%llu)\n", what, (unsigned long long)number);
    fflush(stderr);
    _exit(1);
}

static uint64_t mix(uint64_t x) {               /* splitmix64, Steele, Lea, Flood 2014 */
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static int memfd(unsigned size) {
    int fd = memfd_create("latest_stress", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, size) < 0)
        fail("memfd_create", (uint64_t)errno);
    return fd;
}

static char *map(int fd, unsigned times, int protection) {
    char *start = mmap(NULL, PAGE * times, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (unsigned i = 0; i < times; i++)
        if (start == MAP_FAILED
            || mmap(start + i * PAGE, PAGE, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
            fail("mmap", (uint64_t)errno);
    return start;
}

static int is_in_pool(uint64_t number) {
    return mix(seed ^ number * 5) % 4 == 0;
}

static uint32_t length_of(uint64_t number) {
    return is_in_pool(number) ? EXTENT : (uint32_t)(mix(seed ^ number * 3) % 200);
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

/* -- the writer ----------------------------------------------------------------------------------------------------- */

typedef struct {
    aw_producer ring;
    char *pool;
    uint64_t at[INDEX];         /* of the records from `floor` on, by their numbers */
    int unit[INDEX];
    uint64_t live[EXTENTS];     /* 1 + the number of the record that refers to it, 0: none did */
    uint64_t floor, number;
    uint64_t passed;            /* extents that were free but for a pin */
} writing;

static void raise(writing *me, uint64_t number) {
    aw_publish_latest(&me->ring, me->floor < me->number ? me->at[me->floor % INDEX] : me->ring.head);
    me->floor = number;
    aw_raise_floor(&me->ring, number < me->number ? me->at[number % INDEX] : me->ring.head);
    aw_fence();
}

static int place(writing *me) {                 /* an extent that nobody reads: -1, none */
    for (;;) {
        for (unsigned i = 0; i < EXTENTS; i++) {
            int pinned = 0;
            if (me->live[i] > me->floor)
                continue;
            for (uint32_t pin = 0; pin < aw_pins_used(&me->ring); pin++)
                pinned |= aw_pin_of(&me->ring, pin) == i + 1;
            if (!pinned)
                return (int)i;
            me->passed++;
        }
        if (me->floor == me->number)
            return -1;
        raise(me, me->floor + 1 + (me->number - me->floor) / 4);
    }
}

static void room(writing *me, uint64_t need) {
    uint64_t least = me->ring.head + need - me->ring.size, number = me->floor;
    if ((me->floor < me->number ? me->at[me->floor % INDEX] : me->ring.head) >= least)
        return;
    least += me->ring.size / 4;
    while (number < me->number && me->at[number % INDEX] < least)
        number++;
    raise(me, number);
}

static void *write_all(void *argument) {
    writing *me = argument;
    char bytes[256];
    for (; me->number <= wanted; me->number++) {
        uint32_t length = length_of(me->number), kind = me->number == wanted ? END : INLINE;
        uint64_t word = 0;
        int unit = -1;
        if (kind == INLINE && is_in_pool(me->number)) {
            unit = place(me);
            if (unit >= 0) {
                kind = IN_POOL;
                fill(me->pool + (unsigned)unit * EXTENT, length, me->number);
                me->live[unit] = me->number + 1;
                word = (uint64_t)unit;
                length = 8;
            } else {
                length = 0;                     /* a reader has all in hand: told by an empty record */
            }
        } else {
            fill(bytes, length, me->number);
        }
        room(me, aw_space(AW_NUMBER + length));
        me->at[me->number % INDEX] = me->ring.head;
        me->unit[me->number % INDEX] = unit;
        aw_commit_latest(&me->ring, kind, me->number, kind == IN_POOL ? (char *)&word : bytes, AW_NUMBER + length);
        aw_publish_latest(&me->ring, me->floor <= me->number ? me->at[me->floor % INDEX] : me->ring.head);
        if (mix(seed ^ me->number * 7) % 64 == 0)
            sched_yield();
    }
    return NULL;
}

/* -- the reader ----------------------------------------------------------------------------------------------------- */

typedef struct {
    aw_consumer ring;
    const char *pool;
    uint64_t got, lost, torn, in_place;
    uint64_t held[HELD], held_unit[HELD];       /* 1 + number; what it has in hand, pin by pin */
} reading;

static void let_go(reading *me, unsigned pin) {
    if (me->held[pin]) {
        check(me->pool + me->held_unit[pin] * EXTENT, EXTENT, me->held[pin] - 1);
        aw_unpin(&me->ring, pin);
        me->held[pin] = 0;
    }
}

static void *read_all(void *argument) {
    reading *me = argument;
    aw_consumer *c = &me->ring;
    char bytes[SIZE];
    uint64_t expected = 0;
    for (;;) {
        aw_record record;
        uint64_t number, at, word;
        int r = aw_latest_look(c);
        unsigned pin;
        if (r < 0)
            fail("the cursors make no sense", expected);
        if (r == 0) {
            sched_yield();
            continue;
        }
        at = c->tail;
        if (aw_latest_peek(c, &record, &number) < 0) {
            if (aw_latest_valid(c, at))
                fail("a record makes no sense", expected);
            me->torn++;
            continue;
        }
        if (mix(seed ^ number * 13) % 64 == 0)
            sched_yield();                      /* the writer goes on, also where both have one CPU */
        aw_get_words(bytes, record.data, record.length - AW_NUMBER);
        if (!aw_latest_valid(c, at)) {
            me->torn++;
            continue;
        }
        if (number < expected || number > wanted)
            fail("numbers go backwards, or too far", number);
        if (record.kind == IN_POOL) {
            pin = (unsigned)(mix(seed ^ number) % HELD);
            let_go(me, pin);
            memcpy(&word, bytes, 8);
            aw_pin(c, pin, (uint32_t)word);
            if (!aw_latest_valid(c, at)) {
                aw_unpin(c, pin);
                me->torn++;
                continue;
            }
            me->held[pin] = number + 1;
            me->held_unit[pin] = word;
            me->in_place++;
            check(me->pool + word * EXTENT, EXTENT, number);
            if (mix(number) % 3)
                let_go(me, pin);
        } else if (record.kind == INLINE && !is_in_pool(number)) {
            if (record.length != AW_NUMBER + length_of(number))
                fail("a record's length is wrong", number);
            check(bytes, length_of(number), number);
        }
        me->lost += number - expected;
        expected = number + 1;
        aw_advance(c, record.length);
        aw_release_records(c);
        if (number == wanted)
            break;
        me->got++;
        if (mix(seed ^ number * 11) % 256 == 0)
            sched_yield();
    }
    for (unsigned pin = 0; pin < HELD; pin++)
        let_go(me, pin);
    if (me->got + me->lost != wanted)
        fail("got and lost are not all", me->got);
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t writer, reader;
    static writing w;
    static reading r;
    if (argc != 4)
        fail("usage: latest_stress one|two MESSAGES SEED", 0);
    wanted = strtoull(argv[2], NULL, 10);
    seed = mix(strtoull(argv[3], NULL, 10));
    data_fd = memfd(PAGE), pool_fd = memfd(PAGE), control_fd = memfd(PAGE);
    w.ring.data = map(data_fd, 2, PROT_READ | PROT_WRITE);
    w.ring.control = (aw_control *)map(control_fd, 1, PROT_READ | PROT_WRITE);
    w.pool = map(pool_fd, 1, PROT_READ | PROT_WRITE);
    w.ring.size = r.ring.size = SIZE;
    if (argv[1][0] == 'o') {
        r.ring.data = w.ring.data;
        r.ring.control = w.ring.control;
        r.pool = w.pool;
    } else {
        r.ring.data = map(data_fd, 2, PROT_READ);
        r.ring.control = (aw_control *)map(control_fd, 1, PROT_READ | PROT_WRITE);
        r.pool = map(pool_fd, 1, PROT_READ);
    }
    w.ring.head = SIZE;
    aw_let_begin_latest(&w.ring, SIZE, 0);
    aw_let_begin(&w.ring, SIZE);
    aw_publish(&w.ring);
    aw_begin(&r.ring, aw_start(&r.ring));
    if (pthread_create(&writer, NULL, write_all, &w) || pthread_create(&reader, NULL, read_all, &r))
        fail("pthread_create", 0);
    pthread_join(writer, NULL);
    pthread_join(reader, NULL);
    printf("%llu got, %llu lost, %llu torn, %llu in place, %llu passed over\n", (unsigned long long)r.got,
           (unsigned long long)r.lost, (unsigned long long)r.torn, (unsigned long long)r.in_place,
           (unsigned long long)w.passed);
    return 0;
}
