# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Bytes in chained blocks: what comes is written behind what is here, what goes is cut off in front, nothing is moved.

    Buffer   head ──► block ──► block ──► block ◄── tail
                      │ start            │ end
    block    header │ ░░░░ content ░░░░░░░░░░ room │        of a pool's fixed size, or
             header ──► a bytes object, whole or what is left of it, never written to

`fill` reads by one readv(2) into the room of the last block and as many fresh ones as lately were filled (1, 2, 4, ... up
to 256 KiB); what stays empty goes back to the pool. `drain` writes by sendmsg(2) or writev(2), up to IOV_MAX pieces at a
time, never with SIGPIPE (`writing.h`). Appending copies small pieces and refers to bytes objects of 8 KiB and more, which
can't change; memory of anybody else is always copied, so that its owner may change it afterwards.

Descriptors must be non-blocking; calls keep the GIL, for giving it up costs more. A pool and its buffers belong to one
thread (the GIL protects them otherwise).
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.errno cimport EAGAIN, EINTR, errno
from libc.string cimport memchr, memcmp, memcpy

import os

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX

cdef extern from "<sys/uio.h>" nogil:
    ssize_t readv(int fd, iovec* parts, int count)

cdef extern from "anywire/engine/writing.h" nogil:
    ssize_t aw_writev(int fd, iovec* parts, int count, int* plain)

cdef enum:
    BLOCK = 16384
    KEEP = 64
    REFER = 8192            # bytes objects from this size on aren't copied; so many are copied in about 200 ns
    MOST_READ = 262144
    PIECES = 512            # below IOV_MAX (1024), and 8 KiB of stack


@cython.final
cdef class BlockPool:
    """Blocks of one size, given back and used again.

    Args:
        block_size: bytes of content in each.
        keep: how many free ones are kept; more go back to the allocator.
    """

    def __cinit__(self, Py_ssize_t block_size=BLOCK, Py_ssize_t keep=KEEP):
        if block_size < 1 or block_size > 1 << 30 or keep < 0:
            raise ValueError(f"blocks of {block_size} bytes, {keep} of them kept: sizes are above 0, at most 1 GiB")
        self.block_size = block_size
        self.keep = keep

    def __dealloc__(self):
        cdef aw_block* block
        while self.free != NULL:
            block = self.free
            self.free = block.next
            PyMem_Free(block)

    cdef aw_block* take(self) except NULL:
        cdef aw_block* block = self.free
        if block != NULL:
            self.free = block.next
            self.free_count -= 1
        else:
            block = <aw_block*> PyMem_Malloc(sizeof(aw_block) + self.block_size)
            if block == NULL:
                raise MemoryError
            block.owner = NULL
            block.data = <char*> (block + 1)
            block.size = self.block_size
        block.next = NULL
        block.start = 0
        block.end = 0
        self.used += 1
        return block

    cdef void give(self, aw_block* block) noexcept:
        if block.owner != NULL:
            Py_XDECREF(block.owner)
            PyMem_Free(block)
            return
        self.used -= 1
        if self.free_count >= self.keep:
            PyMem_Free(block)
        else:
            block.next = self.free
            self.free = block
            self.free_count += 1


cdef BlockPool common = BlockPool()


# It refers to its pool alone, so it makes no cycles, and the pool is still here when its blocks go back.
@cython.no_gc
@cython.final
cdef class Buffer:
    """Bytes on their way, in chained blocks.

    Args:
        pool: where its blocks come from; None takes one that all such buffers share.

    >>> buffer = Buffer()
    >>> buffer.append(b"one line\\nanother")
    >>> buffer.take(buffer.find(b"\\n") + 1), len(buffer), buffer.take()
    (b'one line\\n', 7, b'another')
    """

    def __cinit__(self, BlockPool pool=None):
        self.pool = common if pool is None else pool
        self.window = 1
        self.plain_fd = -1

    def __dealloc__(self):
        if self.pool is not None:
            self.c_skip(self.size)
            if self.head != NULL:
                self.pool.give(self.head)
                self.head = NULL

    cdef aw_block* link(self, aw_block* block) noexcept:
        """Put a block behind the last one. An empty last block goes: there is at most one, and only alone."""
        if self.tail != NULL and self.tail.start == self.tail.end:
            self.pool.give(self.tail)
            self.head = NULL
            self.tail = NULL
        if self.tail == NULL:
            self.head = block
        else:
            self.tail.next = block
        self.tail = block
        return block

    cdef int c_append(self, const char* p, Py_ssize_t n) except -1:
        """Copy n bytes behind the rest."""
        cdef aw_block* tail
        cdef Py_ssize_t room
        while n > 0:
            tail = self.tail
            if tail == NULL or tail.owner != NULL or tail.end == tail.size:
                tail = self.link(self.pool.take())
            room = min(tail.size - tail.end, n)
            memcpy(tail.data + tail.end, p, room)
            tail.end += room
            self.size += room
            p += room
            n -= room
        return 0

    cdef int c_append_bytes(self, bytes data) except -1:
        """Put a bytes object behind the rest: by reference, if it is large."""
        cdef aw_block* block
        cdef Py_ssize_t n = PyBytes_GET_SIZE(data)
        if n < REFER:
            return self.c_append(PyBytes_AS_STRING(data), n)
        block = <aw_block*> PyMem_Malloc(sizeof(aw_block))
        if block == NULL:
            raise MemoryError
        Py_INCREF(data)
        block.owner = <PyObject*> data
        block.data = PyBytes_AS_STRING(data)
        block.next = NULL
        block.start = 0
        block.end = n
        block.size = n
        self.link(block)
        self.size += n
        return 0

    cdef void c_skip(self, Py_ssize_t n) noexcept:
        """Cut off n bytes in front; no more than are here."""
        cdef aw_block* block
        cdef Py_ssize_t here
        n = min(n, self.size)
        self.size -= n
        while n > 0:
            block = self.head
            here = block.end - block.start
            if n < here:
                block.start += n
                return
            n -= here
            if block.next == NULL and block.owner == NULL:
                # The last one is kept: the next bytes come soon.
                block.start = 0
                block.end = 0
                return
            self.head = block.next
            if self.head == NULL:
                self.tail = NULL
            self.pool.give(block)

    cdef int c_copy(self, char* into, Py_ssize_t start, Py_ssize_t n) noexcept:
        """Copy n bytes from `start` on; they are all here."""
        cdef aw_block* block = self.head
        cdef Py_ssize_t here
        while n > 0:
            here = block.end - block.start
            if start >= here:
                start -= here
            else:
                here = min(here - start, n)
                memcpy(into, block.data + block.start + start, here)
                into += here
                n -= here
                start = 0
            block = block.next
        return 0

    cdef int c_pieces(self, iovec* into, int count, Py_ssize_t most) noexcept:
        """The content where it lies: at most `count` pieces of `most` bytes together. Returns how many pieces."""
        cdef aw_block* block = self.head
        cdef Py_ssize_t here
        cdef int n = 0
        while block != NULL and n < count and most > 0:
            here = min(block.end - block.start, most)
            if here > 0:
                into[n].iov_base = block.data + block.start
                into[n].iov_len = here
                most -= here
                n += 1
            block = block.next
        return n

    cdef Py_ssize_t c_fill(self, int fd, Py_ssize_t most) except -2:
        cdef iovec parts[66]
        cdef aw_block* fresh[65]
        cdef int count = 0, blocks = 0, i, e = 0
        cdef Py_ssize_t room = 0, n, left, here
        cdef aw_block* tail = self.tail
        most = min(most, <Py_ssize_t> MOST_READ)
        if most <= 0:
            raise ValueError("a fill of 0 bytes would look like the end")
        if tail != NULL and tail.owner == NULL and tail.end < tail.size:
            parts[0].iov_base = tail.data + tail.end
            parts[0].iov_len = min(tail.size - tail.end, most)
            room = parts[0].iov_len
            count = 1
        while room < most and blocks < min(self.window, 64):
            try:
                fresh[blocks] = self.pool.take()
            except MemoryError:
                if count == 0:
                    raise
                break
            parts[count].iov_base = fresh[blocks].data
            parts[count].iov_len = min(fresh[blocks].size, most - room)
            room += parts[count].iov_len
            count += 1
            blocks += 1
        n = readv(fd, parts, count)
        while n < 0 and errno == EINTR:
            try:
                PyErr_CheckSignals()
            except BaseException:
                for i in range(blocks):
                    self.pool.give(fresh[i])
                raise
            n = readv(fd, parts, count)
        if n < 0:
            e = errno
        left = max(n, <Py_ssize_t> 0)
        self.size += left
        if count > blocks:
            here = min(<Py_ssize_t> parts[0].iov_len, left)
            tail.end += here
            left -= here
        for i in range(blocks):
            here = min(fresh[i].size, left)
            if here > 0:
                fresh[i].end = here
                left -= here
                self.link(fresh[i])
            else:
                self.pool.give(fresh[i])
        # As much as lately came is offered next time.
        if n == room and room < most:
            self.window = min(2 * self.window, <int> max(MOST_READ // self.pool.block_size, <Py_ssize_t> 1))
        elif 4 * n < room:
            self.window = max(self.window // 2, 1)
        if n >= 0:
            return n
        if e == EAGAIN:
            return -1
        raise OSError(e, f"reading from descriptor {fd}: {os.strerror(e)}")

    cdef Py_ssize_t c_drain(self, int fd, Py_ssize_t most) except -2:
        cdef iovec parts[PIECES]
        cdef int count, e, i
        cdef Py_ssize_t n, asked, total = 0
        if self.plain_fd != fd:
            self.plain = 0
            self.plain_fd = fd
        while self.size and most > 0:
            count = self.c_pieces(parts, PIECES, most)
            asked = 0
            for i in range(count):
                asked += parts[i].iov_len
            n = aw_writev(fd, parts, count, &self.plain)
            if n < 0:
                e = errno
                if e == EINTR:
                    PyErr_CheckSignals()
                    continue
                if e == EAGAIN:
                    return total if total else -1
                if total:
                    return total        # the error will be there the next time, too
                raise OSError(e, f"writing to descriptor {fd}: {os.strerror(e)}")
            self.c_skip(n)
            total += n
            most -= n
            if n < asked:
                break                   # full: asking again would say EAGAIN
        return total

    cdef void c_move(self, Buffer other) noexcept:
        """All of `other`'s blocks behind the rest, without a copy. Both have the same pool."""
        if other.size == 0:
            return
        self.link(other.head)
        self.tail = other.tail
        self.size += other.size
        other.head = NULL
        other.tail = NULL
        other.size = 0

    cdef Py_ssize_t c_find(self, const char* what, Py_ssize_t length, Py_ssize_t start) noexcept:
        """Where `what` begins, from `start` on, also across blocks; -1 if nowhere."""
        cdef aw_block* block = self.head
        cdef aw_block* next
        cdef Py_ssize_t base = 0, here, at, done, part, offset
        cdef const char* p
        while block != NULL:
            here = block.end - block.start
            at = max(start - base, <Py_ssize_t> 0)
            while at < here and base + at + length <= self.size:
                p = <const char*> memchr(block.data + block.start + at, what[0], here - at)
                if p == NULL:
                    break
                at = p - (block.data + block.start)
                # Compare, block by block.
                next = block
                offset = at
                done = 0
                while done < length and next != NULL:
                    part = min(next.end - next.start - offset, length - done)
                    if memcmp(next.data + next.start + offset, what + done, part) != 0:
                        break
                    done += part
                    offset = 0
                    next = next.next
                if done == length:
                    return base + at
                at += 1
            base += here
            block = block.next
        return -1

    def append(self, data not None):
        """Put bytes behind the rest. The caller may change `data` afterwards; large bytes objects aren't copied."""
        cdef Py_buffer view
        if type(data) is bytes:
            self.c_append_bytes(data)
            return
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.c_append(<const char*> view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    def fill(self, int fd, Py_ssize_t most=MOST_READ):
        """Read once from a non-blocking descriptor, behind the rest.

        Args:
            most: as many bytes at most; no call reads more than 256 KiB.

        Returns:
            How many bytes came; 0 at the end; None if nothing is here yet.

        Raises:
            OSError: what the kernel says, ECONNRESET for instance.
        """
        cdef Py_ssize_t n = self.c_fill(fd, most)
        return None if n < 0 else n

    def drain(self, int fd, Py_ssize_t most=PY_SSIZE_T_MAX):
        """Write to a non-blocking descriptor until it is full, or `most` bytes have gone, and cut them off.

        Returns:
            How many bytes went; None if the kernel takes none now.

        Raises:
            BrokenPipeError: the writing side was shut, or the reader is gone; SIGPIPE is never raised.
            OSError: what else the kernel says.
        """
        cdef Py_ssize_t n = self.c_drain(fd, most)
        return None if n < 0 else n

    def take(self, Py_ssize_t most=PY_SSIZE_T_MAX):
        """Cut off `most` bytes in front (fewer, if fewer are here) and return them."""
        cdef bytes found = self.peek(most)
        self.c_skip(len(found))
        return found

    def peek(self, Py_ssize_t most=PY_SSIZE_T_MAX):
        """Return `most` bytes in front (fewer, if fewer are here); they stay."""
        cdef bytes found
        most = max(min(most, self.size), <Py_ssize_t> 0)
        if self.head != NULL and self.head.owner != NULL and self.head.start == 0 and most == self.head.size:
            return <object> self.head.owner
        found = PyBytes_FromStringAndSize(NULL, most)
        self.c_copy(PyBytes_AS_STRING(found), 0, most)
        return found

    def skip(self, Py_ssize_t count):
        """Cut off `count` bytes in front. ValueError: negative, or more than are here."""
        if not 0 <= count <= self.size:
            raise ValueError(f"can't skip {count} bytes of {self.size}")
        self.c_skip(count)

    def find(self, bytes what not None, Py_ssize_t start=0):
        """Where `what` begins, at `start` or later; -1 if nowhere. ValueError: `what` is empty."""
        if not what:
            raise ValueError("nothing to look for")
        return self.c_find(PyBytes_AS_STRING(what), PyBytes_GET_SIZE(what), max(start, <Py_ssize_t> 0))

    def move(self, Buffer other not None):
        """Put all that `other` has behind the rest, without a copy, and leave it empty. ValueError: another pool's."""
        if other.pool is not self.pool:
            raise ValueError("these buffers have different pools; append(other.take()) copies")
        if other is not self:
            self.c_move(other)

    def __len__(self):
        return self.size

    def __repr__(self):
        return f"<Buffer of {self.size} bytes>"
