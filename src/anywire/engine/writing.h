/* Gathered writes that never raise SIGPIPE: a peer that is gone, or a write after shutdown, is EPIPE and no more.

   Sockets take MSG_NOSIGNAL (send(2)). For all else the signal is blocked in this thread during the write and, if the
   write raised it (it is sent to the thread that wrote: signal(7)), taken back. Python ignores SIGPIPE unless a program has
   set its default again, so mostly the look at the disposition is all that this costs. */
#ifndef ANYWIRE_WRITING_H
#define ANYWIRE_WRITING_H

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

/* *plain: set to 1 once fd was found not to be a socket; the caller keeps it beside the fd. */
static inline ssize_t aw_writev(int fd, struct iovec *parts, int count, int *plain)
{
    struct sigaction action;
    sigset_t pipe_only, former, waiting;
    struct timespec none = {0, 0};
    ssize_t n;
    int had, e;
    if (!*plain) {
        struct msghdr message;
        memset(&message, 0, sizeof message);
        message.msg_iov = parts;
        message.msg_iovlen = (size_t) count;
        n = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0 || errno != ENOTSOCK)
            return n;
        *plain = 1;
    }
    if (sigaction(SIGPIPE, NULL, &action) == 0 && !(action.sa_flags & SA_SIGINFO) && action.sa_handler == SIG_IGN)
        return writev(fd, parts, count);
    sigemptyset(&pipe_only);
    sigaddset(&pipe_only, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe_only, &former);
    sigpending(&waiting);
    had = sigismember(&waiting, SIGPIPE);
    n = writev(fd, parts, count);
    e = errno;
    if (n < 0 && e == EPIPE && !had)
        while (sigtimedwait(&pipe_only, NULL, &none) < 0 && errno == EINTR)
            ;
    pthread_sigmask(SIG_SETMASK, &former, NULL);
    errno = e;
    return n;
}

#endif
