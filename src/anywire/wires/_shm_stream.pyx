# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The byte face of shared memory: the ring's records without their boundaries.

A stream over `_shm`'s endpoint, which does everything but the bytes: meeting, doorbells, death, waiting. Bytes always go
through the ring, so a stream's memory is its two rings. Threads and fronts as for `_shm`.

What can go wrong: as there; a peer that dies without an end shows as `PeerLost`, not as the end of the stream.
"""
from libc.string cimport memcpy
from anywire.contract.endpoint cimport (AGAIN, BLOCKED, DONE, READ, WRITE, ByteEndpoint, MessageEndpoint, RawEndpoint,
                                        iovec)
from anywire.wires._ring cimport aw_commit, aw_has_room, aw_peek, aw_record, aw_slot
from anywire.wires._shm cimport ShmEndpoint
from anywire.wires._shm_memory cimport Incoming

import time

from anywire.contract.errors import AnywireError

cdef enum:
    BYTES = 0                      # kinds of records, as in _shm
    END = 5


cdef class ShmBytes(ByteEndpoint):
    """Bytes in and out of the rings of `end`."""

    cdef ShmEndpoint end
    cdef Py_ssize_t offset         # bytes of the oldest record that were read

    def __init__(self, ShmEndpoint end):
        self.end = end
        self.read_fd = self.write_fd = end.sock
        self.address = end.address
        self.peer = end.peer
        self.wire = end.wire

    cdef Py_ssize_t read(self, char* p, size_t n, bint block) except -1:
        cdef ShmEndpoint end = self.end
        cdef Incoming inc = end.inc
        cdef aw_record record
        cdef Py_ssize_t done = 0, part
        cdef int r
        self.want = READ
        while done < <Py_ssize_t> n:
            if inc is None:
                end.need_open_here()
            r = aw_peek(&inc.ring, &record)
            if r > 0 and record.kind == BYTES and <Py_ssize_t> record.length >= self.offset and record.length:
                part = min(<Py_ssize_t> n - done, <Py_ssize_t> record.length - self.offset)
                memcpy(p + done, record.data + self.offset, part)
                done += part
                self.offset += part
                if self.offset == <Py_ssize_t> record.length:
                    self.offset = 0
                    end.consumed(inc, record.length)
                continue
            if done:
                break
            if r > 0 and record.kind == END and not end.ended:
                end.consumed(inc, record.length)
                end.ended = True
            elif r > 0:
                end.spoiled(end.nonsense(f"a record of kind {record.kind} in a stream"))
            elif end.ended:
                return 0
            elif not end.nothing_here(inc, r):
                return AGAIN
        return done

    cdef Py_ssize_t write(self, iovec* iov, int count, bint block) except -1:
        cdef ShmEndpoint end = self.end
        cdef Py_ssize_t done = 0, n, part
        cdef const char* p
        cdef int i
        end.need_sending()
        end.look_now_and_then()
        self.want = WRITE
        for i in range(count):
            p = <const char*> iov[i].iov_base
            n = iov[i].iov_len
            while n:
                part = min(n, end.inline_limit)
                if aw_has_room(&end.out.ring, part) <= 0:
                    if end.room_came(part):      # arms the doorbell, also when a part went: the rest waits for it
                        continue
                    return done if done else AGAIN
                memcpy(aw_slot(&end.out.ring), p, part)
                aw_commit(&end.out.ring, BYTES, part)
                end.publish()
                p += part
                n -= part
                done += part
        return done

    def release(self):
        self.end.release()
        self.read_fd = self.write_fd = -1


cdef class ShmStream(RawEndpoint):
    """The bare stream over a connection of shared memory, which it takes over."""

    cdef ShmEndpoint shm

    def __cinit__(self, *args, **keywords):
        self.doorbell = True

    def __init__(self, ShmEndpoint shm):
        RawEndpoint.__init__(self, ShmBytes(shm), shm.address)
        self.shm = shm
        self.death_fd = shm.death
        shm.share_slot(self)

    def set_asynchronous(self):
        self.asynchronous = True
        self.shm.set_asynchronous()

    cdef int rung(self) except -1:
        self.turns = 0
        return self.shm.rung()

    cdef bint hung_up(self) noexcept:
        return self.shm.hung_up()

    cdef bint set_polled(self, bint polled) noexcept:
        return self.shm.set_polled(polled)

    cdef bint something_here(self) noexcept:
        return self.shm.something_here()

    cdef bint arm(self) noexcept:
        return self.shm.arm()

    cdef int wait_ready(self, int mask, double timeout) except -1:
        return self.shm.wait_ready(mask, timeout)

    def need_wake_fd(self):
        self.shm.need_wake_fd()

    def drop_wake_fd(self):
        self.shm.drop_wake_fd()

    def interrupt(self):
        self.shm.interrupt()

    cdef int adopt_output(self) except -1:
        RawEndpoint.adopt_output(self)
        if self.unread_output:
            self.shm.leave_over()
        return 0

    cdef int on_io_error(self, object error) except -1:
        if isinstance(error, AnywireError):
            self.fail(error)
            raise error
        return RawEndpoint.on_io_error(self, error)

    def try_eof(self):
        cdef int status
        if self.flush_output(False) != DONE:
            return BLOCKED
        if not self.bytes.eof_written:
            status = self.shm.try_eof()
            if status != DONE:
                self.want = WRITE
                return status
            self.bytes.eof_written = True
        return DONE

    def detach_state(self):
        return self.shm.detach_state()

    def finish_steps(self, timeout):
        cdef double end = time.monotonic() + timeout
        self.shm.waits_for_room += 1             # as in ShmEndpoint.finish_steps
        try:
            while not self.broken and self.flush_armed() != DONE:
                self.turns = 0
                if not (yield from self.shm.sign_steps(end, False)):
                    return
        finally:
            self.shm.waits_for_room -= 1
        if not self.broken:
            yield from self.shm.finish_steps(max(0.0, end - time.monotonic()))

    cdef int flush_armed(self) except -1:
        """Write what is left, as the async front does: the doorbell is armed when it must wait."""
        self.shm.asynchronous = True
        return self.flush_output(False)

    def drain_steps(self, timeout):
        yield from self.shm.drain_steps(timeout)

    def release(self):
        RawEndpoint.release(self)
        self.death_fd = -1
