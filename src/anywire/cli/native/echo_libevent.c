/* An echo server on libevent's buffered events, for `anywire bench connections`.
 *
 * usage: echo_libevent   prints "READY PORT"
 *
 * What was read moves from the input buffer to the output buffer without a copy, as libevent's own book does it. */
#include <arpa/inet.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/listener.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>

static void readable(struct bufferevent *connection, void *nothing) {
    (void)nothing;
    bufferevent_write_buffer(connection, bufferevent_get_input(connection));
}

static void ended(struct bufferevent *connection, short what, void *nothing) {
    (void)nothing;
    if (what & (BEV_EVENT_EOF | BEV_EVENT_ERROR)) bufferevent_free(connection);
}

static void connected(
    struct evconnlistener *listener, evutil_socket_t fd, struct sockaddr *address, int length, void *base
) {
    int on = 1;
    (void)listener;
    (void)address;
    (void)length;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct bufferevent *connection = bufferevent_socket_new(base, fd, BEV_OPT_CLOSE_ON_FREE);
    bufferevent_setcb(connection, readable, NULL, ended, NULL);
    bufferevent_enable(connection, EV_READ | EV_WRITE);
}

int main(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);       /* it ends with who started it */
    signal(SIGPIPE, SIG_IGN);
    struct event_base *base = event_base_new();
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    struct evconnlistener *listener = evconnlistener_new_bind(
        base, connected, base, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_REUSEABLE, 4096, (struct sockaddr *)&address, size);
    if (!listener) {
        perror("listen");
        return 1;
    }
    getsockname(evconnlistener_get_fd(listener), (struct sockaddr *)&address, &size);
    printf("READY %d\n", ntohs(address.sin_port));
    fflush(stdout);
    return event_base_dispatch(base);
}
