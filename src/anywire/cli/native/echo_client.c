/* Load generator for echo servers.
 *
 * usage: echo_client HOST PORT CONNECTIONS SIZE DEPTH SECONDS raw|framed SERVER_PID [rotate ACTIVE | spin]
 * prints one JSON object
 *
 * Each connection keeps DEPTH messages of SIZE bytes under way. rotate: only ACTIVE connections have one under way, and
 * each answer lets the next connection in turn send. spin: this client never sleeps, so what is measured is the server. During the warm-up every echoed byte is compared with
 * what was sent; after it, long payloads are thrown away inside the kernel (MSG_TRUNC, tcp(7)), so that the client
 * stays cheaper than any server. Latency is from the first send call of a message to the arrival of its last byte.
 * SERVER_PID (or 0) is whose CPU time is counted, from /proc/PID/task/.../schedstat (nanoseconds).
 *
 * framed: speaks the preamble and the eight-byte frame headers; each header confirms what arrived since the last one.
 *
 * exit status: 3 the server stalled or hung up, 4 it answered with other bytes than were sent */
#include "wire.h"
#include "cpu.h"

#define CHUNK (256u << 10)
#define DISCARD_FROM 4096u
#define WARM_UP_NS 200000000u
#define STALL_NS 10000000000u
#define SUB 32                      /* histogram buckets in one power of two: 3 % wide */

struct connection {
    int fd, wants_write;
    size_t sent;                    /* bytes of the message being sent that are out */
    size_t got;                     /* bytes of the message being received that are here, its header included */
    uint32_t unconfirmed;           /* received since our last header */
    char header[HEADER];            /* of the message being received */
    char greeting[HEADER];          /* of the message being sent */
    unsigned first, next;           /* messages under way: indices into started */
    uint64_t *started;
};

static int epoll_fd, framed, checking = 1, measuring, discard, active, finished;
static size_t size, head;           /* head: HEADER or 0 */
static unsigned depth;
static char *payload, *chunk;
static uint64_t done, histogram[64 * SUB];

static int bucket(uint64_t v) {
    if (v < SUB) return (int)v;
    int power = 63 - __builtin_clzll(v);
    return (power - 4) * SUB + (int)((v >> (power - 5)) & (SUB - 1));
}

static double bucket_value(int i) {
    if (i < SUB) return i;
    int power = i / SUB + 4;
    return (double)((1ull << power) + ((uint64_t)(i % SUB) << (power - 5)));
}

static double percentile(double share) {
    uint64_t total = 0, seen = 0;
    for (int i = 0; i < 64 * SUB; i++) total += histogram[i];
    for (int i = 0; i < 64 * SUB; i++) {
        seen += histogram[i];
        if (total && (double)seen >= (double)total * share) return bucket_value(i) / 1e3;
    }
    return 0;
}

static void want_write(struct connection *c, int on) {
    if (c->wants_write == on) return;
    struct epoll_event e = {.events = EPOLLIN | (on ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
    c->wants_write = on;
}

/* Fill the window; a message that went out in part is continued first. */
static void fill(struct connection *c) {
    while (c->sent || c->next - c->first < depth) {
        if (!c->sent) {
            if (framed) {
                put32(c->greeting, (uint32_t)size);
                put32(c->greeting + 4, c->unconfirmed);
            }
            c->started[c->next % depth] = now_ns(CLOCK_MONOTONIC);
        }
        struct iovec parts[2] = {{c->greeting, head}, {payload, size}};
        size_t skip = c->sent;
        int from = 0;
        if (skip >= head) from = 1, skip -= head;
        parts[from].iov_base = (char *)parts[from].iov_base + skip;
        parts[from].iov_len -= skip;
        struct msghdr message = {.msg_iov = parts + from, .msg_iovlen = (size_t)(2 - from)};
        ssize_t n = sendmsg(c->fd, &message, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN) fail("send");
            want_write(c, 1);
            return;
        }
        if (!c->sent) {
            c->next++;
            c->unconfirmed = 0;
        }
        c->sent += (size_t)n;
        if (c->sent == head + size) c->sent = 0;
    }
    want_write(c, 0);
}

static void wrong(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(4);
}

/* Take `n` bytes that arrived; data is NULL when the kernel threw them away. */
static void take(struct connection *c, const char *data, size_t n) {
    size_t at = 0;
    while (at < n) {
        if (c->got < head) {
            c->header[c->got++] = data[at++];
            if (c->got == head && get32(c->header) != size) {
                if (get32(c->header) != KIND_CONFIRM) wrong("unexpected frame");
                c->got = 0;
            }
            continue;
        }
        size_t part = head + size - c->got;
        if (part > n - at) part = n - at;
        if (checking && memcmp(data + at, payload + c->got - head, part)) wrong("corrupt echo");
        c->got += part;
        at += part;
        if (c->got < head + size) continue;
        if (c->first == c->next) wrong("an answer to nothing");
        if (measuring) histogram[bucket(now_ns(CLOCK_MONOTONIC) - c->started[c->first % depth])]++;
        c->first++;
        c->unconfirmed++;
        c->got = 0;
        done++;
        if (active) finished++;
    }
}

static void readable(struct connection *c) {
    for (;;) {
        /* Inside a long payload the kernel may drop what follows, but never the next header. */
        size_t rest = c->got >= head ? head + size - c->got : 0;
        int drop = discard && rest >= DISCARD_FROM;
        size_t wanted = drop ? rest : CHUNK;
        ssize_t n = recv(c->fd, chunk, wanted, drop ? MSG_TRUNC : 0);
        if (n < 0) {
            if (errno == EAGAIN) return;
            fail("recv");
        }
        if (!n) {
            fprintf(stderr, "the server hung up\n");
            exit(3);
        }
        take(c, drop ? NULL : chunk, (size_t)n);
        if ((size_t)n < wanted || (drop && depth == 1)) return;
    }
}

static void greet(int fd) {
    char preamble[PREAMBLE], rest[65536];
    fill_preamble(preamble);
    if (send(fd, preamble, PREAMBLE, MSG_NOSIGNAL) != PREAMBLE) fail("preamble");
    if (recv(fd, preamble, PREAMBLE, MSG_WAITALL) != PREAMBLE) fail("preamble");
    unsigned extensions = check_preamble(preamble);
    if (extensions && recv(fd, rest, extensions, MSG_WAITALL) != (ssize_t)extensions) fail("preamble");
}

int main(int argc, char **argv) {
    if (argc < 9) return 2;
    struct sockaddr_in address = ipv4(argv[1], argv[2]);
    int connections = atoi(argv[3]), pid = atoi(argv[8]);
    double seconds = atof(argv[6]);
    size = (size_t)atol(argv[4]);
    depth = (unsigned)atoi(argv[5]);
    framed = !strcmp(argv[7], "framed");
    head = framed ? HEADER : 0;
    active = argc == 11 && !strcmp(argv[9], "rotate") ? atoi(argv[10]) : 0;
    int patience = argc == 10 && !strcmp(argv[9], "spin") ? 0 : 1000;
    unsigned turn = 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL);       /* it ends with who started it */
    signal(SIGPIPE, SIG_IGN);
    payload = malloc(size);
    chunk = malloc(CHUNK > size ? CHUNK : size);
    for (size_t i = 0; i < size; i++) payload[i] = (char)(i * 167 + (i >> 8) * 13 + 5);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct connection *all = calloc((size_t)connections, sizeof *all);
    for (int i = 0; i < connections; i++) {
        struct connection *c = all + i;
        c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        /* Another source address for each 5 000: closed connections occupy their port for a minute. */
        struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7F000002u + (unsigned)i / 5000)};
        int late = 1;
        setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &late, sizeof late);
        if (connections > 5000 && bind(c->fd, (void *)&source, sizeof source)) fail("bind");
        if (connect(c->fd, (void *)&address, sizeof address)) fail("connect");
        no_delay(c->fd);
        if (framed) greet(c->fd);
        non_blocking(c->fd);
        c->started = calloc(depth, sizeof *c->started);
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &e);
    }
    for (; turn < (unsigned)(active ? active : connections); turn++) fill(all + turn);
    uint64_t start = now_ns(CLOCK_MONOTONIC), warm = start + WARM_UP_NS, stall = start + STALL_NS, end = 0;
    uint64_t own = 0;
    double theirs = 0;
    struct epoll_event ready[512];
    for (;;) {
        int count = epoll_wait(epoll_fd, ready, 512, patience);
        uint64_t now = now_ns(CLOCK_MONOTONIC);
        if (measuring && now >= end) {
            end = now;
            break;
        }
        if (!measuring && now >= warm && done >= (uint64_t)connections) {
            measuring = 1;
            checking = 0;
            discard = size >= DISCARD_FROM;
            done = 0;
            own = now_ns(CLOCK_PROCESS_CPUTIME_ID);
            theirs = server_cpu(pid);
            start = now = now_ns(CLOCK_MONOTONIC);
            end = start + (uint64_t)(seconds * 1e9);
        }
        if ((!measuring && now > stall) || (count == 0 && patience && measuring && now > start + STALL_NS)) {
            fprintf(stderr, "the server stalled after %llu messages\n", (unsigned long long)done);
            return 3;
        }
        for (int i = 0; i < count; i++) {
            struct connection *c = ready[i].data.ptr;
            if (ready[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) readable(c);
            if (!active || c->sent) fill(c);
        }
        for (; finished; finished--) {
            while (all[turn % (unsigned)connections].next != all[turn % (unsigned)connections].first) turn++;
            fill(all + turn++ % (unsigned)connections);
        }
    }
    double elapsed = (double)(end - start) / 1e9;
    theirs = server_cpu(pid) - theirs;
    printf("{\"rate\": %.1f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"client_load\": %.3f, \"server_cpu_us\": %.3f}\n",
           (double)done / elapsed, percentile(.5), percentile(.99),
           (double)(now_ns(CLOCK_PROCESS_CPUTIME_ID) - own) / 1e9 / elapsed,
           done ? theirs * 1e6 / (double)done : 0.0);
    return 0;
}
