/* System calls that fail, or do less than they were asked to, on a schedule: a library for LD_PRELOAD.
 *
 * Only TCP and UDP sockets are touched, and epoll; files, pipes and the loops' own wakeups are left alone. Nothing
 * happens until faults_begin, which the program under test calls by dlsym (ctypes) when it is ready:
 *
 *   faults_begin(call, every, error, times)   each `every`th call of this name fails with `error`, `times` times at most
 *   faults_short(call, limit)                 calls of this name handle at most 1 byte, 2, ... `limit` and 1 again; each
 *                                             of these until a call had more to handle
 *   faults_end()                              no faults from here on
 *   faults_hits(call)                         how many failed since faults_begin
 *   faults_lengths(call)                      how many different lengths were cut short since faults_short
 *
 * Functions and not system calls are replaced, as signal(7) and the manual page of each name their results. Names mean
 * groups: "receive" is read, readv, recv, recvfrom and recvmsg; "send" is write, writev, send, sendto, sendmsg and
 * sendfile; "accept" is accept and accept4; "poll" is epoll_wait, epoll_pwait and epoll_pwait2. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { RECEIVE, SEND, ACCEPT, POLL, GROUPS };
#define LONGEST 65536
#define PARTS 64

static const char *const names[GROUPS] = {"receive", "send", "accept", "poll"};
static struct {
    long every, times, count, hits, limit, turns;
    int error;
    unsigned char cut[LONGEST];
} faults[GROUPS];

static int group_of(const char *name) {
    for (int i = 0; i < GROUPS; i++)
        if (!strcmp(names[i], name)) return i;
    return -1;
}

int faults_begin(const char *name, long every, int error, long times) {
    int group = group_of(name);
    if (group < 0) return -1;
    faults[group].count = faults[group].hits = 0;
    faults[group].error = error;
    faults[group].times = times;
    faults[group].every = every;
    return 0;
}

int faults_short(const char *name, long limit) {
    int group = group_of(name);
    if (group < 0 || limit > LONGEST) return -1;
    memset(faults[group].cut, 0, LONGEST);
    faults[group].turns = 0;
    faults[group].limit = limit;
    return 0;
}

void faults_end(void) {
    for (int i = 0; i < GROUPS; i++) faults[i].every = faults[i].limit = 0;
}

long faults_hits(const char *name) { return faults[group_of(name)].hits; }

long faults_lengths(const char *name) {
    long found = 0;
    for (int i = 0; i < LONGEST; i++) found += faults[group_of(name)].cut[i];
    return found;
}

static int of_network(int fd) {
    int saved = errno, domain = 0;
    socklen_t size = sizeof domain;
    int found = !getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) && (domain == AF_INET || domain == AF_INET6);
    errno = saved;
    return found;
}

/* 1: this call fails, errno is set. */
static int fails(int group, int fd) {
    if (!faults[group].every || (group != POLL && !of_network(fd))) return 0;
    if (++faults[group].count % faults[group].every || faults[group].hits >= faults[group].times) return 0;
    faults[group].hits++;
    errno = faults[group].error;
    return 1;
}

/* How many of `wanted` bytes this call may handle. */
static size_t allowed(int group, int fd, size_t wanted) {
    if (!faults[group].limit || !of_network(fd)) return wanted;
    size_t most = 1 + (size_t)(faults[group].turns % faults[group].limit);
    return wanted < most ? wanted : most;
}

static ssize_t done(int group, size_t wanted, size_t most, ssize_t result) {
    if (most < wanted && result == (ssize_t)most) {
        faults[group].cut[most] = 1;
        faults[group].turns++;
    }
    return result;
}

#define ORIGINAL(name) \
    static __typeof__(name) *original; \
    if (!original) *(void **)&original = dlsym(RTLD_NEXT, #name)

#define HANDLE(group, name, fd, wanted, call) \
    ORIGINAL(name); \
    if (fails(group, fd)) return -1; \
    size_t most = allowed(group, fd, wanted); \
    return done(group, wanted, most, call)

ssize_t read(int fd, void *buffer, size_t size) { HANDLE(RECEIVE, read, fd, size, original(fd, buffer, most)); }

ssize_t recv(int fd, void *buffer, size_t size, int flags) {
    HANDLE(RECEIVE, recv, fd, size, original(fd, buffer, most, flags));
}

/* CPython is compiled with fortification, which calls these when it knows the buffer's size. */
ssize_t __read_chk(int fd, void *buffer, size_t size, size_t room) {
    (void)room;
    return read(fd, buffer, size);
}

ssize_t __recv_chk(int fd, void *buffer, size_t size, size_t room, int flags) {
    (void)room;
    return recv(fd, buffer, size, flags);
}

static int datagrams(int fd) {
    int kind = 0;
    socklen_t size = sizeof kind;
    return !getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &size) && kind == SOCK_DGRAM;
}

ssize_t recvfrom(int fd, void *buffer, size_t size, int flags, struct sockaddr *from, socklen_t *length) {
    ORIGINAL(recvfrom);
    if (fails(RECEIVE, fd)) return -1;
    size_t most = datagrams(fd) ? size : allowed(RECEIVE, fd, size);
    return done(RECEIVE, size, most, original(fd, buffer, most, flags, from, length));
}

ssize_t write(int fd, const void *buffer, size_t size) { HANDLE(SEND, write, fd, size, original(fd, buffer, most)); }

ssize_t send(int fd, const void *buffer, size_t size, int flags) {
    HANDLE(SEND, send, fd, size, original(fd, buffer, datagrams(fd) ? size : most, flags));
}

ssize_t sendto(int fd, const void *buffer, size_t size, int flags, const struct sockaddr *to, socklen_t length) {
    ORIGINAL(sendto);
    if (fails(SEND, fd)) return -1;
    size_t most = datagrams(fd) ? size : allowed(SEND, fd, size);
    return done(SEND, size, most, original(fd, buffer, most, flags, to, length));
}

ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    HANDLE(SEND, sendfile, out, size, original(out, in, offset, most));
}

static size_t total(const struct iovec *parts, size_t count) {
    size_t sum = 0;
    for (size_t i = 0; i < count; i++) sum += parts[i].iov_len;
    return sum;
}

/* The first `most` bytes of these parts; how many parts that makes, at most PARTS. */
static size_t trim(const struct iovec *parts, size_t count, size_t most, struct iovec *into) {
    size_t used = 0;
    for (; used < count && used < PARTS && most; used++) {
        into[used] = parts[used];
        if (into[used].iov_len > most) into[used].iov_len = most;
        most -= into[used].iov_len;
    }
    return used;
}

ssize_t readv(int fd, const struct iovec *parts, int count) {
    struct iovec mine[PARTS];
    size_t wanted = total(parts, (size_t)count);
    ORIGINAL(readv);
    if (fails(RECEIVE, fd)) return -1;
    size_t most = allowed(RECEIVE, fd, wanted);
    if (most == wanted) return original(fd, parts, count);
    return done(RECEIVE, wanted, most, original(fd, mine, (int)trim(parts, (size_t)count, most, mine)));
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    struct iovec mine[PARTS];
    size_t wanted = total(parts, (size_t)count);
    ORIGINAL(writev);
    if (fails(SEND, fd)) return -1;
    size_t most = allowed(SEND, fd, wanted);
    if (most == wanted) return original(fd, parts, count);
    return done(SEND, wanted, most, original(fd, mine, (int)trim(parts, (size_t)count, most, mine)));
}

static ssize_t message(
    int group, int fd, struct msghdr *whole, ssize_t (*original)(int, struct msghdr *, int), int flags
) {
    struct iovec mine[PARTS];
    size_t wanted = total(whole->msg_iov, whole->msg_iovlen);
    if (fails(group, fd)) return -1;
    size_t most = datagrams(fd) ? wanted : allowed(group, fd, wanted);
    if (most == wanted) return original(fd, whole, flags);
    struct msghdr part = *whole;
    part.msg_iov = mine;
    part.msg_iovlen = trim(whole->msg_iov, whole->msg_iovlen, most, mine);
    ssize_t result = done(group, wanted, most, original(fd, &part, flags));
    whole->msg_namelen = part.msg_namelen;
    whole->msg_controllen = part.msg_controllen;
    whole->msg_flags = part.msg_flags;
    return result;
}

ssize_t recvmsg(int fd, struct msghdr *whole, int flags) {
    ORIGINAL(recvmsg);
    return message(RECEIVE, fd, whole, original, flags);
}

ssize_t sendmsg(int fd, const struct msghdr *whole, int flags) {
    ORIGINAL(sendmsg);
    struct msghdr copy = *whole;
    return message(SEND, fd, &copy, (ssize_t (*)(int, struct msghdr *, int))original, flags);
}

int accept(int fd, struct sockaddr *address, socklen_t *length) {
    ORIGINAL(accept);
    return fails(ACCEPT, fd) ? -1 : original(fd, address, length);
}

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags) {
    ORIGINAL(accept4);
    return fails(ACCEPT, fd) ? -1 : original(fd, address, length, flags);
}

int epoll_wait(int fd, struct epoll_event *events, int most, int timeout) {
    ORIGINAL(epoll_wait);
    return fails(POLL, fd) ? -1 : original(fd, events, most, timeout);
}

int epoll_pwait(int fd, struct epoll_event *events, int most, int timeout, const sigset_t *mask) {
    ORIGINAL(epoll_pwait);
    return fails(POLL, fd) ? -1 : original(fd, events, most, timeout, mask);
}

int epoll_pwait2(
    int fd, struct epoll_event *events, int most, const struct timespec *timeout, const sigset_t *mask
) {
    ORIGINAL(epoll_pwait2);
    return fails(POLL, fd) ? -1 : original(fd, events, most, timeout, mask);
}
