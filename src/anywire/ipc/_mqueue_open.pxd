# An open message queue, for what sends and receives: see _mqueue_open.pyx.
cdef extern from "anywire/ipc/interrupt.h":
    struct aw_waiter:
        pass
    void aw_enlist(aw_waiter** all, aw_waiter* one)
    void aw_delist(aw_waiter* one)
    bint aw_interruptible(int number)

cdef extern from "<mqueue.h>":
    struct mq_attr:
        long mq_flags
        long mq_maxmsg
        long mq_msgsize
        long mq_curmsgs


cdef class OpenQueue:
    cdef int fd
    cdef readonly object name
    cdef readonly long max_messages
    cdef readonly long message_size
    cdef readonly bint owner
    cdef object maker                  # the process that opened it
    cdef int users                     # threads in a system call without the GIL
    cdef aw_waiter* waiting            # those of them whose call only a signal ends
    cdef unsigned int nudges           # how often `_nudge` was called
    cdef int generation
    cdef bint closing
    cdef int waker                     # eventfd that `close` makes readable; -1: nobody has waited long yet
    cdef object notifications          # a WeakSet, or None
    cdef object __weakref__
    cdef int take(self, int fd, object name, bint owner) except -1
    cdef int interrupt(self) except -1
    cdef void let_go(self) noexcept                         # when nobody uses it any more
    cdef mq_attr attributes(self) except *
    cdef bint blocks(self) except -1                        # False: O_NONBLOCK is set
    cdef int usable(self) except -1                         # OSError: it is closed
    cdef int current(self) except -1
    cdef int enter(self) except -1                          # before system calls without the GIL; OSError: it is closed
    cdef void leave(self) noexcept                          # after them
