/* An echo server on libuv, for `anywire bench connections`.
 *
 * usage: echo_libuv      prints "READY PORT"
 *
 * Each read is tried to be sent back at once (uv_try_write); what the kernel does not take is copied and written later,
 * and the connection is not read meanwhile: that is its back-pressure. */
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <uv.h>

#define CHUNK (256u << 10)

static char chunk[CHUNK];

struct later {
    uv_write_t request;
    uv_stream_t *stream;
    char data[];
};

static void check(int status, const char *what) {
    if (status >= 0) return;
    fprintf(stderr, "%s: %s\n", what, uv_strerror(status));
    exit(1);
}

static void drop(uv_handle_t *handle) { free(handle); }

static void space(uv_handle_t *handle, size_t hint, uv_buf_t *into) {
    (void)handle;
    (void)hint;
    *into = uv_buf_init(chunk, CHUNK);
}

static void readable(uv_stream_t *stream, ssize_t got, const uv_buf_t *buffer);

static void written(uv_write_t *request, int status) {
    struct later *rest = (struct later *)request;
    if (status < 0) {
        if (!uv_is_closing((uv_handle_t *)rest->stream)) uv_close((uv_handle_t *)rest->stream, drop);
    } else {
        uv_read_start(rest->stream, space, readable);
    }
    free(rest);
}

static void readable(uv_stream_t *stream, ssize_t got, const uv_buf_t *buffer) {
    if (got < 0) {
        uv_close((uv_handle_t *)stream, drop);
        return;
    }
    uv_buf_t answer = uv_buf_init(buffer->base, (unsigned)got);
    int sent = got ? uv_try_write(stream, &answer, 1) : 0;
    if (sent == UV_EAGAIN) sent = 0;
    if (sent < 0) {
        uv_close((uv_handle_t *)stream, drop);
        return;
    }
    if (sent == got) return;
    size_t left = (size_t)(got - sent);
    struct later *rest = malloc(sizeof *rest + left);
    rest->stream = stream;
    memcpy(rest->data, buffer->base + sent, left);
    answer = uv_buf_init(rest->data, (unsigned)left);
    uv_read_stop(stream);
    check(uv_write(&rest->request, stream, &answer, 1, written), "write");
}

static void connected(uv_stream_t *listener, int status) {
    if (status < 0) return;
    uv_tcp_t *client = malloc(sizeof *client);
    uv_tcp_init(listener->loop, client);
    if (uv_accept(listener, (uv_stream_t *)client)) {
        uv_close((uv_handle_t *)client, drop);
        return;
    }
    uv_tcp_nodelay(client, 1);
    uv_read_start((uv_stream_t *)client, space, readable);
}

int main(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);       /* it ends with who started it */
    uv_loop_t *loop = uv_default_loop();
    uv_tcp_t listener;
    struct sockaddr_in address;
    int length = sizeof address;
    check(uv_tcp_init(loop, &listener), "init");
    uv_ip4_addr("127.0.0.1", 0, &address);
    check(uv_tcp_bind(&listener, (struct sockaddr *)&address, 0), "bind");
    check(uv_listen((uv_stream_t *)&listener, 4096, connected), "listen");
    uv_tcp_getsockname(&listener, (struct sockaddr *)&address, &length);
    printf("READY %d\n", ntohs(address.sin_port));
    fflush(stdout);
    return uv_run(loop, UV_RUN_DEFAULT);
}
