/* The native echo server that the Python servers are measured against: one thread, level-triggered epoll.
 *
 * usage: echo_server HOST PORT [framed]        prints "READY PORT"; PORT 0 takes a free one
 *
 * raw     sends back what one recv brought.
 * framed  answers the preamble, collects whole messages as a framed channel has to, and sends each run of whole
 *         messages back with one call. Each header confirms one message: the one that it echoes.
 *
 * While output is pending a connection is not read: that is its back-pressure. */
#include "wire.h"

#define CHUNK (256u << 10)

struct connection {
    int fd, greeted, waits_to_write;
    char *in;                        /* framed: bytes not yet answered */
    size_t in_length, in_space;
    char *out;                       /* what send did not take */
    size_t out_start, out_length, out_space;
};

static int epoll_fd, framed;
static char chunk[CHUNK];

static void watch(struct connection *c, uint32_t events, int operation) {
    struct epoll_event e = {.events = events, .data.ptr = c};
    if (epoll_ctl(epoll_fd, operation, c->fd, &e)) fail("epoll_ctl");
}

static void drop(struct connection *c) {
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

static void room(char **buffer, size_t *space, size_t needed) {
    if (needed <= *space) return;
    size_t grown = *space ? *space : 4096;
    while (grown < needed) grown *= 2;
    *buffer = realloc(*buffer, grown);
    if (!*buffer) fail("realloc");
    *space = grown;
}

/* 0 once the peer is gone */
static int answer(struct connection *c, const char *data, size_t length) {
    ssize_t sent = send(c->fd, data, length, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) return 0;
    if (sent < 0) sent = 0;
    if ((size_t)sent == length) return 1;
    room(&c->out, &c->out_space, c->out_length + length - (size_t)sent);
    memcpy(c->out + c->out_length, data + sent, length - (size_t)sent);
    c->out_length += length - (size_t)sent;
    if (!c->waits_to_write) {
        watch(c, EPOLLOUT, EPOLL_CTL_MOD);
        c->waits_to_write = 1;
    }
    return 1;
}

static int flush(struct connection *c) {
    ssize_t sent = send(c->fd, c->out + c->out_start, c->out_length - c->out_start, MSG_NOSIGNAL);
    if (sent < 0) return errno == EAGAIN;
    c->out_start += (size_t)sent;
    if (c->out_start == c->out_length) {
        c->out_start = c->out_length = 0;
        watch(c, EPOLLIN, EPOLL_CTL_MOD);
        c->waits_to_write = 0;
    }
    return 1;
}

static int raw_turn(struct connection *c) {
    ssize_t got = recv(c->fd, chunk, CHUNK, 0);
    if (got < 0) return errno == EAGAIN;
    return got && answer(c, chunk, (size_t)got);
}

static int framed_turn(struct connection *c) {
    size_t wanted = CHUNK;
    if (c->in_length >= HEADER && get32(c->in) < FIRST_KIND) {
        size_t whole = HEADER + (size_t)get32(c->in);
        if (whole > c->in_length && whole - c->in_length > wanted) wanted = whole - c->in_length;
    }
    /* The space is there from the first turn on: growing it at each turn would cost a copy. */
    room(&c->in, &c->in_space, c->in_length + wanted);
    ssize_t got = recv(c->fd, c->in + c->in_length, c->in_space - c->in_length, 0);
    if (got < 0) return errno == EAGAIN;
    if (!got) return 0;
    c->in_length += (size_t)got;
    size_t start = 0;
    if (!c->greeted) {
        char preamble[PREAMBLE];
        if (c->in_length < PREAMBLE || c->in_length < PREAMBLE + check_preamble(c->in)) return 1;
        start = PREAMBLE + check_preamble(c->in);
        c->greeted = 1;
        fill_preamble(preamble);
        if (!answer(c, preamble, PREAMBLE)) return 0;
    }
    size_t end = start;
    int alive = 1;
    while (alive && c->in_length - end >= HEADER) {
        uint32_t length = get32(c->in + end);
        if (length >= FIRST_KIND) {                     /* a confirmation is skipped; end and close end it */
            if (end > start) alive = answer(c, c->in + start, end - start);
            start = end += HEADER;
            alive = alive && length == KIND_CONFIRM;
            continue;
        }
        if (length > LARGEST) return 0;
        if (c->in_length - end - HEADER < length) break;
        put32(c->in + end + 4, 1);
        end += HEADER + length;
    }
    if (alive && end > start) alive = answer(c, c->in + start, end - start);
    c->in_length -= end;
    if (c->in_length) memmove(c->in, c->in + end, c->in_length);
    return alive;
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    framed = argc > 3 && !strcmp(argv[3], "framed");
    prctl(PR_SET_PDEATHSIG, SIGKILL);       /* it ends with who started it */
    signal(SIGPIPE, SIG_IGN);
    struct sockaddr_in address = ipv4(argv[1], argv[2]);
    socklen_t length = sizeof address;
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (void *)&address, length) || listen(listener, 4096)) fail("listen");
    getsockname(listener, (void *)&address, &length);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL}, ready[512];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &e);
    printf("READY %d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int count = epoll_wait(epoll_fd, ready, 512, -1);
        for (int i = 0; i < count; i++) {
            struct connection *c = ready[i].data.ptr;
            if (c) {
                int alive = c->waits_to_write ? flush(c) : framed ? framed_turn(c) : raw_turn(c);
                if (!alive) drop(c);
                continue;
            }
            int fd;
            while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
                no_delay(fd);
                c = calloc(1, sizeof *c);
                c->fd = fd;
                watch(c, EPOLLIN, EPOLL_CTL_ADD);
            }
        }
    }
}
