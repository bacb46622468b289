/* What both native programs know of anywire's bytes (docs/design/interfaces.md), and a few socket helpers.
 *
 * Numbers on the wire are little-endian; these programs are for measurements on x86-64 and AArch64 Linux, so they
 * copy integers as they are. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PREAMBLE 24
#define HEADER 8
#define FIRST_KIND 0xFFFFFFF0u
#define KIND_CONFIRM 0xFFFFFFFCu
#define LARGEST (16u << 20)

static const unsigned char MAGIC[8] = {0x89, 'a', 'n', 'y', 'w', 0x0D, 0x0A, 0x0A};

static inline void fail(const char *what) {
    perror(what);
    exit(1);
}

static inline void put32(char *at, uint32_t value) { memcpy(at, &value, 4); }

static inline uint32_t get32(const char *at) {
    uint32_t value;
    memcpy(&value, at, 4);
    return value;
}

/* magic, version 1.0, no extensions, no flags, the largest message this side receives */
static inline void fill_preamble(char out[PREAMBLE]) {
    uint64_t largest = LARGEST;
    memset(out, 0, PREAMBLE);
    memcpy(out, MAGIC, 8);
    out[8] = 1;
    memcpy(out + 16, &largest, 8);
}

/* Bytes of extensions that follow this preamble; exits on anything that does not welcome us. */
static inline unsigned check_preamble(const char *in) {
    uint16_t extensions;
    if (memcmp(in, MAGIC, 8) || in[8] != 1) {
        fprintf(stderr, "the peer does not speak anywire 1\n");
        exit(4);
    }
    if (get32(in + 12) & 1) {
        fprintf(stderr, "the peer refused the connection\n");
        exit(4);
    }
    memcpy(&extensions, in + 10, 2);
    return extensions;
}

static inline struct sockaddr_in ipv4(const char *host, const char *port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    if (inet_pton(AF_INET, host, &a.sin_addr) != 1) {
        fprintf(stderr, "not an IPv4 address: %s\n", host);
        exit(2);
    }
    return a;
}

static inline void no_delay(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static inline void non_blocking(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

static inline uint64_t now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
