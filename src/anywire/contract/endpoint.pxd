# The seam below every channel and stream: I/O that never waits.
from libc.stdint cimport uint64_t
from anywire.contract.counters cimport Slot

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

cdef enum:
    READ = 1
    WRITE = 2

# Results of ByteEndpoint.read/write besides a byte count (-1 is "exception set").
cdef enum:
    AGAIN = -2

# Results of MessageEndpoint.put/flush.
cdef enum:
    BLOCKED = 0        # nothing of the message was taken: wait, then put() again
    DONE = 1           # the whole message was handed to the kernel (or queue)
    PARTIAL = 2        # a part was written: wait, then flush() until DONE; adopt() if the caller gives up

cdef enum:
    OWN_BUFFER = 139264   # bytes; the read area of a blocking front: a 128 KiB message with its header in one call

cdef enum:
    SCRATCH = 262144   # bytes; the largest read of one turn, and the size of the shared read area

cdef uint64_t monotonic_ns() noexcept nogil
cdef unsigned int fork_generation() noexcept nogil
cdef char* scratch() noexcept nogil
cdef object hold(object data, const char** p, Py_ssize_t* n)
cdef Py_ssize_t copy_message(object message, char* p, Py_ssize_t size, object address) except -1
cdef int wait_fd(int fd, int mask, int wake_fd, double timeout) except -1


cdef class Loan:
    cdef char* memory
    cdef readonly Py_ssize_t nbytes
    cdef Py_ssize_t exports
    cdef bint private                    # the memory is its own
    cdef public bint sent
    cdef int need_open(self) except -1


cdef class ByteEndpoint:
    cdef public int read_fd
    cdef public int write_fd
    cdef public int want
    cdef public object address
    cdef public object peer
    cdef public object wire
    cdef public bint eof_written
    cdef public bint buffered            # keeps bytes of its own: a short read does not mean that nothing is left
    cdef public bint interruptible       # `interrupt` wakes threads in a blocking call or in poll, as shutdown(2) does
    cdef bint whole                      # the next blocking read wants all n bytes (MSG_WAITALL), not just what is here
    cdef int users
    cdef bint doomed
    cdef Py_ssize_t read(self, char* p, size_t n, bint block) except -1
    cdef Py_ssize_t write(self, iovec* iov, int count, bint block) except -1
    cdef void leave(self) noexcept
    cdef object take_fds(self, Py_ssize_t count)
    cdef int give_fds(self, object fds) except -1


cdef class MessageEndpoint:
    cdef public int read_fd
    cdef public int write_fd
    cdef public int want
    cdef public object address
    cdef public object peer
    cdef public object wire
    cdef public bint doorbell            # one descriptor rings for both, data and room: it is only ever read
    cdef bint quick                      # it has put_quick and take_quick
    cdef bint again                      # "nothing here" meant: more is here, but others get a turn first
    cdef public bint asynchronous        # its front is the async one (set for endpoints with a doorbell)
    cdef bint polled                     # the loop looks whether something is here, and arms the doorbell before it sleeps
    cdef public int death_fd             # with a doorbell: readable when the peer process is dead, -1: none
    cdef public double wake_at           # monotonic seconds: a receiver that waits tries again then; 0: never
    cdef public Py_ssize_t max_message
    cdef public bint closed              # this side closed or aborted
    cdef public bint broken              # nothing more can be received or sent: fail with `failure`
    cdef unsigned int generation
    cdef Slot* slot
    cdef uint64_t sent                   # messages accepted for sending, for `unconfirmed`
    cdef uint64_t confirmed
    cdef bint drained                    # the last read emptied the kernel's buffer ...
    cdef long drained_tick               # ... at this tick of the coarse clock
    cdef unsigned int turns              # system calls since the caller last gave way to others
    cdef bint unread_output              # output that nobody waits for (an adopted rest): flush when writable
    cdef object wakeup                   # called when ready, for endpoints without descriptor
    cdef object failure                  # why it is broken: raised anew by each later call
    cdef int put_status                  # of the last message of put_messages
    cdef int wake_fd                     # blocking front: wakes the threads that wait in poll, once and for all
    cdef int waiters                     # threads that wait there
    cdef list returned                   # taken and not handed out (a signal, a small buffer), last one first: these come next
    cdef object next_message(self, bint block)
    cdef object next_fds_message(self, bint block)
    cdef object next_view(self, bint block)
    cdef object take_view(self, bint block)
    cdef int rung(self) except -1
    cdef bint put_quick(self, bytes data) except -1
    cdef object take_quick(self)
    cdef bint hung_up(self) noexcept
    cdef bint set_polled(self, bint polled) noexcept
    cdef bint something_here(self) noexcept
    cdef bint arm(self) noexcept
    cdef Py_ssize_t next_message_into(self, char* p, Py_ssize_t size, bint block) except -2
    cdef int need_nothing_returned(self) except -1
    cdef int give_back(self, list messages) except -1
    cdef object after_signals(self, object taken)
    cdef list next_messages(self, object first, Py_ssize_t limit)
    cdef object take_message(self, bint block)
    cdef Py_ssize_t take_message_into(self, char* p, Py_ssize_t size, bint block) except -2
    cdef int stop_into(self) except -1
    cdef int put_message(self, object data, bint block) except -1
    cdef Py_ssize_t put_messages(self, list data, Py_ssize_t start, bint block) except -1
    cdef int flush_output(self, bint block) except -1
    cdef int adopt_output(self) except -1
    cdef int wait_ready(self, int mask, double timeout) except -1
    cdef int check(self) except -1
    cdef void start_turn(self) noexcept
    cdef int raise_failure(self) except -1
    cdef bint output_pending(self) noexcept


cdef class BytePump(MessageEndpoint):
    cdef readonly ByteEndpoint bytes
    cdef char head[32]
    cdef int head_size, head_sent
    cdef object body                     # keeps the caller's buffer while a part of it is still to be written
    cdef const char* body_data
    cdef size_t body_size, body_sent
    cdef char* rest                      # what an abandoned send left over
    cdef size_t rest_size, rest_sent
    cdef bint writing, reading
    cdef bint begun                      # the last emit() wrote at least a part: its message goes whole
    cdef char* own_buffer                # read area of the blocking front (the GIL is released while reading)
    cdef int emit(self, const char* head, int head_size, const char* p, size_t n, object keep, bint block) except -1
    cdef void advance_output(self, Py_ssize_t done) noexcept
    cdef void drop_output(self) noexcept
    cdef Py_ssize_t read_at(self, char* p, size_t size, bint block) except -1
    cdef Py_ssize_t fill(self, char** p, size_t n, bint block) except -1
    cdef int on_io_error(self, object error) except -1


cdef class RawEndpoint(BytePump):
    cdef bytearray pushed                # bytes read ahead by read_until
    cdef readonly bint at_eof
    cdef Py_ssize_t expected             # bytes; what the next read is likely to bring, 0 while that is little
    cdef object read_bytes(self, Py_ssize_t n, bint block)
    cdef object read_direct(self, Py_ssize_t n, bint block)
    cdef void expect(self, Py_ssize_t n, Py_ssize_t got) noexcept
    cdef Py_ssize_t read_raw_into(self, char* p, Py_ssize_t n, bint block) except -2

