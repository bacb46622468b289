# The counters page: one 256-byte slot for each channel, stream and listener. Layout: docs/design/counters.md.
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    TOTALS = 1         # slot 0: the sums of all released slots
    OVERFLOW = 2       # slot 1: shared by all that found the page full
    CHANNEL = 3
    STREAM = 4
    LISTENER = 5

cdef struct Slot:
    uint32_t state
    uint32_t generation
    uint32_t kind
    uint32_t loss_code
    uint64_t opened_ns
    uint64_t messages_sent
    uint64_t messages_received
    uint64_t bytes_sent
    uint64_t bytes_received
    uint64_t send_waits
    uint64_t recv_waits
    uint64_t send_wait_ns
    uint64_t queue_depth
    uint64_t queue_high
    uint64_t drops
    uint64_t connects
    uint64_t accepts
    uint64_t accept_errors
    uint64_t confirmed
    uint64_t losses
    uint64_t handler_errors
    uint64_t next_free
    char loss_text[32]
    char address[64]

# Never fails and never returns NULL: without memory or descriptors it returns a slot that nobody outside can read.
# Call with the GIL. Then `slot.messages_sent += 1` needs no lock.
cdef Slot* claim(unsigned int kind, bytes address) noexcept
cdef void release(Slot* slot) noexcept                       # NULL and slots inherited over a fork are ignored
cdef void set_label(Slot* slot, bytes address) noexcept
cdef void set_kind(Slot* slot, unsigned int kind) noexcept
cdef void lost(Slot* slot, bytes reason, unsigned int code=*) noexcept   # code: an errno, or 0
cdef object read_slot(const Slot* slot)                      # -> Stats
