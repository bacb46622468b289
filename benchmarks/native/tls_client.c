/* Load generator for TLS echo servers.
 *
 * usage: tls_client HOST PORT CONNECTIONS SIZE SECONDS SERVER_PID       prints one JSON object, as echo_client
 *
 * Each connection has one message of SIZE bytes under way; every echoed byte is compared. The certificate is not: that
 * costs the handshake only, which is not measured. OpenSSL is the one that is installed: it is opened at run time
 * (libssl.so.3 or .1.1), with the few functions that are needed declared here, so no headers are needed.
 *
 * exit status: 3 the server stalled or hung up, 4 it answered with other bytes, 5 there is no libssl */
#include "wire.h"
#include "cpu.h"
#include <dlfcn.h>

#define WARM_UP_NS 200000000u
#define STALL_NS 10000000000u
#define WANT_READ 2
#define WANT_WRITE 3

struct connection {
    int fd, wants_write;
    void *tls;
    size_t sent, got;
    uint64_t started;
};

static void *(*client_method)(void), *(*new_context)(const void *), *(*new_tls)(void *);
static int (*set_fd)(void *, int), (*do_connect)(void *), (*get_error)(const void *, int);
static int (*tls_read)(void *, void *, int), (*tls_write)(void *, const void *, int);

static int epoll_fd;
static size_t size;
static char *payload, *answer;
static uint64_t done, spent;

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found) {
        fprintf(stderr, "libssl has no %s\n", name);
        exit(5);
    }
    return found;
}

static void open_libssl(void) {
    void *library = dlopen("libssl.so.3", RTLD_NOW);
    if (!library) library = dlopen("libssl.so.1.1", RTLD_NOW);
    if (!library) {
        fprintf(stderr, "libssl is not installed\n");
        exit(5);
    }
    *(void **)&client_method = symbol(library, "TLS_client_method");
    *(void **)&new_context = symbol(library, "SSL_CTX_new");
    *(void **)&new_tls = symbol(library, "SSL_new");
    *(void **)&set_fd = symbol(library, "SSL_set_fd");
    *(void **)&do_connect = symbol(library, "SSL_connect");
    *(void **)&get_error = symbol(library, "SSL_get_error");
    *(void **)&tls_read = symbol(library, "SSL_read");
    *(void **)&tls_write = symbol(library, "SSL_write");
}

static void want_write(struct connection *c, int on) {
    if (c->wants_write == on) return;
    struct epoll_event e = {.events = EPOLLIN | (on ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
    c->wants_write = on;
}

/* Continue after what the call says it waits for; anything else is an end. */
static void blocked(struct connection *c, int result) {
    int error = get_error(c->tls, result);
    if (error != WANT_READ && error != WANT_WRITE) {
        fprintf(stderr, "the server hung up\n");
        exit(3);
    }
    want_write(c, error == WANT_WRITE);
}

static void turn(struct connection *c) {
    for (;;) {
        if (c->sent < size) {
            if (!c->sent && !c->started) c->started = now_ns(CLOCK_MONOTONIC);
            /* One record at a time; after WANT_WRITE the same bytes have to be given again, which they are. */
            size_t part = size - c->sent > 16384 ? 16384 : size - c->sent;
            int n = tls_write(c->tls, payload + c->sent, (int)part);
            if (n <= 0) {
                blocked(c, n);
                /* The server may wait for us to take what it has sent already. */
                if (!c->wants_write) return;
            } else {
                c->sent += (size_t)n;
                continue;
            }
        }
        int n = tls_read(c->tls, answer, (int)(size - c->got > 65536 ? 65536 : size - c->got));
        if (n <= 0) {
            int error = get_error(c->tls, n);
            if (error != WANT_READ) blocked(c, n);
            else if (c->sent == size) want_write(c, 0);
            return;
        }
        if (memcmp(answer, payload + c->got, (size_t)n)) {
            fprintf(stderr, "corrupt echo\n");
            exit(4);
        }
        c->got += (size_t)n;
        if (c->got < size) continue;
        spent += now_ns(CLOCK_MONOTONIC) - c->started;
        done++;
        c->sent = c->got = c->started = 0;
    }
}

int main(int argc, char **argv) {
    if (argc != 7) return 2;
    struct sockaddr_in address = ipv4(argv[1], argv[2]);
    int connections = atoi(argv[3]), pid = atoi(argv[6]);
    double seconds = atof(argv[5]);
    size = (size_t)atol(argv[4]);
    signal(SIGPIPE, SIG_IGN);
    open_libssl();
    payload = malloc(size);
    answer = malloc(65536);
    for (size_t i = 0; i < size; i++) payload[i] = (char)(i * 167 + (i >> 8) * 13 + 5);
    void *context = new_context(client_method());
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct connection *all = calloc((size_t)connections, sizeof *all);
    for (int i = 0; i < connections; i++) {
        struct connection *c = all + i;
        c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(c->fd, (void *)&address, sizeof address)) fail("connect");
        no_delay(c->fd);
        c->tls = new_tls(context);
        set_fd(c->tls, c->fd);
        if (do_connect(c->tls) != 1) {
            fprintf(stderr, "the handshake failed\n");
            return 3;
        }
        non_blocking(c->fd);
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &e);
    }
    for (int i = 0; i < connections; i++) turn(all + i);
    uint64_t start = now_ns(CLOCK_MONOTONIC), warm = start + WARM_UP_NS, end = 0, own = 0;
    int measuring = 0;
    double theirs = 0;
    struct epoll_event ready[512];
    for (;;) {
        int count = epoll_wait(epoll_fd, ready, 512, 1000);
        uint64_t now = now_ns(CLOCK_MONOTONIC);
        if (measuring && now >= end) {
            end = now;
            break;
        }
        if (!measuring && now >= warm && done >= (uint64_t)connections) {
            measuring = 1;
            done = spent = 0;
            own = now_ns(CLOCK_PROCESS_CPUTIME_ID);
            theirs = server_cpu(pid);
            start = now = now_ns(CLOCK_MONOTONIC);
            end = start + (uint64_t)(seconds * 1e9);
        }
        if (!measuring && now > start + STALL_NS) {
            fprintf(stderr, "the server stalled after %llu messages\n", (unsigned long long)done);
            return 3;
        }
        for (int i = 0; i < count; i++) turn(ready[i].data.ptr);
    }
    double elapsed = (double)(end - start) / 1e9;
    theirs = server_cpu(pid) - theirs;
    printf("{\"rate\": %.1f, \"mean_us\": %.2f, \"client_load\": %.3f, \"server_cpu_us\": %.3f}\n",
           (double)done / elapsed, done ? (double)spent / (double)done / 1e3 : 0.0,
           (double)(now_ns(CLOCK_PROCESS_CPUTIME_ID) - own) / 1e9 / elapsed,
           done ? theirs * 1e6 / (double)done : 0.0);
    return 0;
}
