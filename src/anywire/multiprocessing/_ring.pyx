# cython: language_level=3, auto_pickle=False
"""The native part of anywire.multiprocessing: rings in shared memory, the ends of a pipe, and the quick half of a
queue.

`records.h` has the ring and says how it survives the death of any user; here are the mapping, what Python sees, and all
waiting: with the GIL released, signal handlers run, deadlines on the monotonic clock. Everything may be used from any
thread and from forked children. Small messages are copied with the GIL held, for that is faster than giving it up.

What can go wrong: OSError (also "shared memory of the queue is damaged"), EOFError, BrokenPipeError, what pickle
raises, and RuntimeError when a signal handler uses the ring whose operation it interrupted in mid-message.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from anywire.contract.heap cimport keep_heap

import copyreg
import errno as errors
import os
import pickle
from multiprocessing import BufferTooShort
from multiprocessing.reduction import ForkingPickler
from queue import Full, Empty

cdef extern from "Python.h":
    object PyByteArray_FromStringAndSize(const char *string, Py_ssize_t length)

cdef extern from "records.h" nogil:
    enum:
        MP_OK
        MP_BUSY
        MP_TIMEDOUT
        MP_INTERRUPTED
        MP_DEADLOCK
        MP_ENDED
        MP_CORRUPT
        MP_SYSTEM
    const int64_t MP_FOREVER
    const uint64_t MP_MAGIC
    ctypedef struct mp_lock:
        pass
    ctypedef struct mp_slot:
        mp_lock lock
        uint64_t count
    ctypedef struct mp_shared:
        uint64_t magic
        uint64_t size
        int64_t futex_offset
        mp_lock put
        mp_lock take
        mp_lock turn
        uint32_t holder
        uint32_t external
        uint64_t head
        uint64_t tail
        uint64_t put_count
        uint64_t got_count
        uint64_t done
        uint32_t writing
        uint32_t skipping
        uint32_t token
        uint32_t looking
    ctypedef struct mp_ring:
        mp_shared *s
        unsigned char *data
        uint64_t size
        uint64_t mask
        int most_spin
        int lock_spins
    ctypedef struct mp_part:
        void *base
        size_t length
    ctypedef struct mp_message:
        mp_part *parts
        int count
        uint64_t total
        uint64_t left
        int content
        int buffers
        int middle
        mp_slot *slot
    ctypedef struct mp_found:
        unsigned char *bytes
        uint64_t length
        uint64_t total
        int first
        int content
        int parts
    long mp_futex_offset
    int64_t mp_now()
    int mp_know_thread()
    int mp_lock_take(mp_ring *r, int64_t deadline)
    void mp_release(mp_lock *lock)
    int mp_find(mp_ring *r, mp_found *f, int bell)
    int mp_take(mp_ring *r, mp_found *f, mp_message *m, int bell)
    int mp_ready(mp_ring *r, int bell)
    int mp_wait(mp_ring *r, int bell, int64_t deadline, int *turn, int *spun)
    int mp_put(mp_ring *r, mp_message *m, int bell, uint64_t most, int64_t patience)
    void mp_put_cancel(mp_ring *r, mp_message *m)
    int mp_wait_slot(mp_ring *r, uint64_t most, int bell, int64_t deadline)
    int mp_wait_room(mp_ring *r, uint64_t need, int bell, int64_t deadline)
    int mp_watch(mp_ring *r, int bell)
    int mp_gone(int bell)
    int mp_barred(mp_ring *r)
    void mp_wait_barred(mp_ring *r, int64_t deadline)
    void mp_bar(mp_ring *r, uint32_t holder)
    void mp_reader_closed(mp_ring *r)
    uint32_t mp_closes(mp_ring *r)
    uint64_t mp_progress(mp_ring *r)
    uint64_t mp_items(mp_shared *s)
    uint64_t mp_backlog(mp_shared *s)
    uint32_t *mp_word(mp_lock *lock)
    mp_slot *mp_slot_take(mp_ring *r)
    int mp_reserve(mp_ring *r, mp_slot *slot, uint64_t most, int64_t patience)
    int mp_task_done(mp_ring *r)
    int mp_join(mp_ring *r)
    void mp_rewind(mp_message *m)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    void *MAP_FAILED
    int PROT_READ, PROT_WRITE, PROT_NONE, MAP_SHARED, MAP_FIXED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE

cdef enum:
    PAGE = 4096
    # With the GIL: copying so much takes about as long as giving it up and getting it back.
    SMALL = 32768
    # A buffer of so many bytes or more goes beside the pickle, not inside it.
    OUT_OF_BAND = 1024
    MOST_BUFFERS = 500
    CHECK_EVERY = 200000                # nanoseconds between looks whether the peer is still there
    BARRED = 100                        # beside the results of records.h: another process has the Turnstile

# What a message holds: bytes of send_bytes, a pickle, an object that is bytes, a pickle with buffers beside it.
cdef enum:
    RAW = 0
    PICKLE = 1
    BYTES = 2
    BUFFERS = 3

cdef object _loads = pickle.loads
cdef object _Pickler = pickle.Pickler
cdef object _EMPTY = object()
cdef dict _extra = ForkingPickler._extra_reducers
cdef dict _standard = copyreg.dispatch_table
cdef list _picklers = []


# ---- pickling -------------------------------------------------------------------------------------------------------

cdef class _Reducers:
    """What ForkingPickler knows to reduce, then copyreg: the same answers as its chain of maps, found faster."""

    def __getitem__(self, key):
        value = _extra.get(key)
        if value is None:
            return _standard[key]
        return value


@cython.final
cdef class _Sink:
    """Collects what a pickler writes, and the buffers that go beside the pickle."""

    cdef list chunks
    cdef list buffers
    cdef object pickler

    def __cinit__(self):
        self.chunks = []
        self.buffers = []
        self.pickler = _Pickler(self, 5, buffer_callback=self.beside)
        self.pickler.dispatch_table = _Reducers()

    def write(self, data):
        self.chunks.append(data)

    def beside(self, buffer):
        if len(self.buffers) >= MOST_BUFFERS:
            return True
        try:
            raw = buffer.raw()
        except BufferError:             # not contiguous: in the pickle
            return True
        if raw.nbytes < OUT_OF_BAND:
            return True
        self.buffers.append(raw)
        return False


@cython.final
cdef class Message:
    """A pickled object on its way into a ring: the pieces of memory that it consists of, kept alive."""

    cdef mp_message m
    cdef mp_part few[4]
    cdef mp_part *many
    cdef Py_buffer *views
    cdef int n_views
    cdef object table
    cdef list keep

    def __dealloc__(self):
        cdef int i
        for i in range(self.n_views):
            PyBuffer_Release(&self.views[i])
        PyMem_Free(self.views)
        PyMem_Free(self.many)

    cdef int add(self, object chunk) except -1:
        cdef mp_part *part = &self.m.parts[self.m.count]
        if type(chunk) is bytes:
            part.base = PyBytes_AS_STRING(chunk)
            part.length = PyBytes_GET_SIZE(chunk)
        else:
            PyObject_GetBuffer(chunk, &self.views[self.n_views], PyBUF_SIMPLE)
            part.base = self.views[self.n_views].buf
            part.length = self.views[self.n_views].len
            self.n_views += 1
        self.m.count += 1
        self.m.total += part.length
        return 0

    cdef int fill(self, list chunks, list buffers) except -1:
        cdef Py_ssize_t n = len(chunks) + len(buffers) + 1
        cdef uint64_t size = 0
        cdef bytearray table
        self.keep = chunks
        self.m.parts = self.few
        if n > 4:
            self.many = <mp_part *>PyMem_Malloc(n * sizeof(mp_part))
            if self.many == NULL:
                raise MemoryError
            self.m.parts = self.many
        self.m.content = PICKLE
        if buffers or n > 2:
            self.views = <Py_buffer *>PyMem_Malloc(n * sizeof(Py_buffer))
            if self.views == NULL:
                raise MemoryError
        if buffers:
            self.m.content = BUFFERS
            self.m.buffers = <int>len(buffers) + 1
            for chunk in chunks:
                size += <uint64_t>len(chunk)
            table = bytearray()
            table += size.to_bytes(8, "little")
            for chunk in buffers:
                table += chunk.nbytes.to_bytes(8, "little")
            self.table = bytes(table)
            self.add(self.table)
        for chunk in chunks:
            self.add(chunk)
        for chunk in buffers:
            self.add(chunk)
        self.m.left = self.m.total
        return 0

    cdef bytes flat(self):
        """All of it in one piece, as it will be in the ring: what the caller's buffers hold now."""
        cdef bytes whole = PyBytes_FromStringAndSize(NULL, self.m.total)
        cdef char *place = PyBytes_AS_STRING(whole)
        cdef int i
        for i in range(self.m.count):
            if self.m.parts[i].length:
                memcpy(place, self.m.parts[i].base, self.m.parts[i].length)
                place += self.m.parts[i].length
        return whole


cdef Message of_bytes(bytes data, int content):
    cdef Message message = Message.__new__(Message)
    message.keep = [data]
    message.m.parts = message.few
    message.m.content = content
    message.few[0].base = PyBytes_AS_STRING(data)
    message.few[0].length = PyBytes_GET_SIZE(data)
    message.m.count = 1
    message.m.total = message.m.left = PyBytes_GET_SIZE(data)
    return message


cdef Message of_flat(bytes data, int content, int buffers):
    cdef Message message = of_bytes(data, content)
    message.m.buffers = buffers
    return message


cdef Message of_object(object obj):
    cdef Message message
    cdef _Sink sink
    cdef list chunks, buffers
    if type(obj) is bytes:
        return of_bytes(obj, BYTES)
    # A pickler serves one dump at a time; one that failed is not used again.
    sink = _picklers.pop() if _picklers else _Sink()
    sink.pickler.dump(obj)
    chunks, buffers = sink.chunks, sink.buffers
    sink.chunks, sink.buffers = [], []
    sink.pickler.clear_memo()
    if len(_picklers) < 4:
        _picklers.append(sink)
    message = Message.__new__(Message)
    if len(chunks) == 1 and not buffers and type(chunks[0]) is bytes:
        message.keep = chunks
        message.m.parts = message.few
        message.m.content = PICKLE
        message.few[0].base = PyBytes_AS_STRING(chunks[0])
        message.m.total = message.m.left = message.few[0].length = PyBytes_GET_SIZE(chunks[0])
        message.m.count = 1
    else:
        message.fill(chunks, buffers)
    return message


# ---- memory ---------------------------------------------------------------------------------------------------------

@cython.final
cdef class Memory:
    """A sealed memfd with one ring or more. Owns its descriptor."""

    cdef readonly int fd

    def __cinit__(self, int fd):
        self.fd = fd

    @staticmethod
    def create(Py_ssize_t size, int rings=1):
        """Memory for `rings` rings of `size` bytes each (a power of two, at least a page). Raises OSError: ENOSPC or
        ENOMEM now, rather than SIGBUS at the first use."""
        import fcntl
        cdef Memory memory
        cdef int i, error
        cdef mp_shared *shared
        if size < PAGE or size & (size - 1):
            raise ValueError(f"a ring's size is a power of two of at least {PAGE} bytes, not {size}")
        error = mp_know_thread()
        if error:
            raise OSError(error, "this system has no robust futexes (get_robust_list(2)), which these queues need")
        memory = Memory(os.memfd_create("anywire-multiprocessing", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.posix_fallocate(memory.fd, 0, rings * (PAGE + size))
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        for i in range(rings):
            shared = <mp_shared *>mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd, i * (PAGE + size))
            if shared == MAP_FAILED:
                PyErr_SetFromErrno(OSError)
            shared.magic = MP_MAGIC
            shared.size = size
            shared.futex_offset = mp_futex_offset
            munmap(shared, PAGE)
        return memory

    def copy(self):
        """The same memory by another descriptor."""
        return Memory(os.dup(self.fd))

    def close(self):
        """Close the descriptor; mappings stay."""
        cdef int fd = self.fd
        self.fd = -1
        if fd >= 0:
            os.close(fd)

    def __dealloc__(self):
        if self.fd >= 0:
            os.close(self.fd)


@cython.final
cdef class Ring:
    """One ring of a Memory, mapped while this object lives."""

    cdef mp_ring r
    cdef readonly int index

    def __cinit__(self, Memory memory not None, int index=0):
        import fcntl
        cdef void *place
        cdef uint64_t size
        cdef Py_ssize_t length = os.fstat(memory.fd).st_size
        cdef long offset
        cdef int i, error = mp_know_thread()
        if error:
            raise OSError(error, "this system has no robust futexes (get_robust_list(2)), which these queues need")
        self.index = index
        keep_heap()
        if not fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK or length < PAGE:
            raise OSError(errors.EINVAL, "this descriptor is not the memory of a queue or pipe")
        place = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd, 0)
        if place == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.r.s = <mp_shared *>place
        size = self.r.s.size
        if (
            self.r.s.magic != MP_MAGIC or self.r.s.futex_offset != mp_futex_offset or size < PAGE or size & (size - 1)
            or size > <uint64_t>length or (index + 1) * (PAGE + size) > <uint64_t>length
        ):
            raise OSError(errors.EINVAL, "this descriptor is not the memory of a queue or pipe of this system")
        offset = index * (PAGE + size)
        if index:
            munmap(place, PAGE)
            self.r.s = NULL
            place = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd, offset)
            if place == MAP_FAILED:
                PyErr_SetFromErrno(OSError)
            self.r.s = <mp_shared *>place
        place = mmap(NULL, 2 * size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if place == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.r.data = <unsigned char *>place
        self.r.size = size
        self.r.mask = size - 1
        for i in range(2):
            if mmap(self.r.data + i * size, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory.fd,
                    offset + PAGE) == MAP_FAILED:
                PyErr_SetFromErrno(OSError)
        # All CPUs, not those of this process alone: it may be pinned to one, and its peer to another.
        if (os.cpu_count() or 1) > 1:
            self.r.most_spin = 100000
            self.r.lock_spins = 60

    def words(self):
        """The words in shared memory as they are at this moment, for whoever looks for a fault."""
        cdef mp_shared *s = self.r.s
        return {
            "size": s.size, "head": s.head, "tail": s.tail, "put_count": s.put_count, "got_count": s.got_count,
            "done": s.done, "backlog": mp_backlog(s), "writing": s.writing, "skipping": s.skipping, "token": s.token,
            "looking": s.looking, "external": s.external, "holder": s.holder, "put": mp_word(&s.put)[0],
            "take": mp_word(&s.take)[0], "turn": mp_word(&s.turn)[0],
        }

    def __dealloc__(self):
        if self.r.data != NULL:
            munmap(self.r.data, 2 * self.r.size)
        if self.r.s != NULL:
            munmap(self.r.s, PAGE)


# ---- moving messages ------------------------------------------------------------------------------------------------

cdef object failed(int result):
    """Raise what a result other than success means."""
    if result == MP_CORRUPT:
        why = "the shared memory of this queue or pipe is damaged: something else wrote into it"
        raise OSError(errors.EBADMSG, why)
    if result == MP_DEADLOCK:
        raise RuntimeError("used by a signal handler that interrupted the same queue or pipe in mid-message")
    if result == MP_ENDED:
        raise BrokenPipeError(errors.EPIPE, "all reading ends of this queue or pipe are closed")
    PyErr_SetFromErrno(OSError)


cdef int64_t deadline_of(object timeout) except -1:
    """The monotonic time, in nanoseconds, that a time-out in seconds means. None: for ever; zero or less: 0, now."""
    cdef double seconds
    if timeout is None:
        return MP_FOREVER
    seconds = timeout
    if not seconds > 0:
        return 0
    if seconds > 1e9:
        return MP_FOREVER
    return mp_now() + <int64_t>(seconds * 1e9) + 1


cdef int put(Ring ring, Message message, int bell, uint64_t most, int64_t patience) except -1:
    """MP_OK, MP_BUSY, MP_TIMEDOUT or MP_ENDED, as mp_put says. Runs signal handlers."""
    cdef mp_ring *r = &ring.r
    cdef mp_message *m = &message.m
    cdef int result = MP_BUSY
    if m.total <= SMALL:
        result = mp_put(r, m, bell, most, 0)
    while result == MP_BUSY or result == MP_INTERRUPTED:
        with nogil:
            result = mp_put(r, m, bell, most, patience)
        if result != MP_INTERRUPTED:
            break
        try:
            PyErr_CheckSignals()
        except:
            if m.middle:
                mp_put_cancel(r, m)
            raise
    if result == MP_CORRUPT or result == MP_DEADLOCK or result == MP_SYSTEM:
        failed(result)
    return result


@cython.final
cdef class _Taken:
    cdef int content
    cdef bytes data
    cdef list buffers

    cdef object obj(self):
        if self.content == BYTES:
            return self.data
        if self.content == BUFFERS:
            return _loads(self.data, buffers=self.buffers)
        return _loads(self.data)

    cdef bytes raw(self):
        """The bytes that the standard library would have sent."""
        if self.content == RAW or self.content == PICKLE:
            return self.data
        return pickle.dumps(self.obj(), 5)


cdef int extract(mp_ring *r, mp_found *f, int bell, _Taken taken) except -1:
    """Copy the message at hand out, under `take`. A result of mp_take; the lock stays with the caller."""
    cdef mp_part few[4]
    cdef mp_part *many = NULL
    cdef mp_message m
    cdef uint64_t size = 0, sum = 0
    cdef int i, result
    memset(&m, 0, sizeof(m))
    m.parts = few
    m.count = 1
    taken.content = f.content
    try:
        if f.content == BUFFERS:
            if f.parts < 1 or f.parts > MOST_BUFFERS + 1 or f.length < <uint64_t>f.parts * 8:
                return MP_CORRUPT
            for i in range(f.parts):
                memcpy(&size, f.bytes + 8 * i, 8)
                sum += size
                if size > f.total or sum > f.total:
                    return MP_CORRUPT
            if sum + f.parts * 8 != f.total:
                return MP_CORRUPT
            m.count = f.parts
            if f.parts > 4:
                many = <mp_part *>PyMem_Malloc(f.parts * sizeof(mp_part))
                if many == NULL:
                    raise MemoryError
                m.parts = many
            taken.buffers = []
            for i in range(f.parts):
                memcpy(&size, f.bytes + 8 * i, 8)
                m.parts[i].length = size
                if i == 0:
                    taken.data = PyBytes_FromStringAndSize(NULL, size)
                    m.parts[i].base = PyBytes_AS_STRING(taken.data)
                else:
                    buffer = PyByteArray_FromStringAndSize(NULL, size)
                    taken.buffers.append(buffer)
                    m.parts[i].base = PyByteArray_AS_STRING(buffer)
            f.bytes += 8 * f.parts
            f.length -= 8 * f.parts
            f.total -= 8 * f.parts
        else:
            taken.data = PyBytes_FromStringAndSize(NULL, f.total)
            m.parts[0].base = PyBytes_AS_STRING(taken.data)
            m.parts[0].length = f.total
        m.total = m.left = f.total
        if f.total <= SMALL and not f.first:
            return mp_take(r, f, &m, bell)
        while True:
            with nogil:
                result = mp_take(r, f, &m, bell)
            if result != MP_INTERRUPTED:
                return result
            PyErr_CheckSignals()        # when it raises, the rest of this message is skipped
    finally:
        PyMem_Free(many)


cdef int signals_in_turn(mp_ring *r) except -1:
    """Run signal handlers with `turn` held; it is released when one raises."""
    try:
        PyErr_CheckSignals()
    except:
        mp_release(&r.s.turn)
        raise
    return 0


cdef object get(Ring ring, int bell, int64_t deadline):
    """The next message (_Taken), or _EMPTY when the deadline passed (0: look once). Raises EOFError at the end."""
    cdef mp_ring *r = &ring.r
    cdef mp_found f
    cdef int turn = 0, spun = 0, result
    cdef _Taken taken
    while True:
        result = mp_lock_take(r, 0)
        if result == MP_BUSY:
            with nogil:
                result = mp_lock_take(r, deadline if deadline else mp_now() + 1000000)
        if result == MP_OK:
            if mp_barred(r):
                mp_release(&r.s.take)
                result = BARRED
            else:
                result = mp_find(r, &f, bell)
                if result == MP_OK:
                    taken = _Taken.__new__(_Taken)
                    try:
                        result = extract(r, &f, bell, taken)
                    finally:
                        mp_release(&r.s.take)
                        if turn:
                            mp_release(&r.s.turn)
                            turn = 0
                    if result == MP_OK:
                        return taken
                    if result == MP_ENDED:
                        continue
                    failed(result)
                mp_release(&r.s.take)
                if result == MP_BUSY:
                    if deadline == 0:
                        return _EMPTY
                    with nogil:
                        result = mp_wait(r, bell, deadline, &turn, &spun)
                    if result == MP_BUSY:
                        signals_in_turn(r)
                        continue
                    if result == MP_OK:
                        continue
        if turn:
            mp_release(&r.s.turn)
            turn = 0
        if result == BARRED:            # another process keeps us from reading
            if deadline == 0 or mp_now() >= deadline:
                return _EMPTY
            with nogil:
                mp_wait_barred(r, deadline)
            PyErr_CheckSignals()
        elif result == MP_INTERRUPTED:
            PyErr_CheckSignals()
        elif result == MP_TIMEDOUT:
            return _EMPTY
        elif result == MP_ENDED:
            raise EOFError
        else:
            failed(result)


cdef bint ready(Ring ring, int bell, int64_t deadline) except -1:
    """Whether there is a message, or the end, before the deadline (0: now)."""
    cdef mp_ring *r = &ring.r
    cdef int turn = 0, spun = 0, result
    while True:
        result = mp_lock_take(r, 0)
        if result == MP_BUSY:
            with nogil:
                result = mp_lock_take(r, deadline if deadline else mp_now() + 1000000)
            if result == MP_TIMEDOUT:
                return True             # somebody is reading a long message
        if result == MP_OK:
            result = mp_ready(r, bell)
            mp_release(&r.s.take)
            if result == MP_BUSY:
                if deadline == 0:
                    if turn:
                        mp_release(&r.s.turn)
                    return mp_gone(bell)
                with nogil:
                    result = mp_wait(r, bell, deadline, &turn, &spun)
                if result == MP_BUSY:
                    signals_in_turn(r)
                    continue
                if result == MP_OK:
                    continue
        if turn:
            mp_release(&r.s.turn)
            turn = 0
        if result == MP_OK or result == MP_ENDED:
            return True
        if result == MP_TIMEDOUT:
            return False
        if result != MP_INTERRUPTED:
            failed(result)
        PyErr_CheckSignals()


# ---- ends -----------------------------------------------------------------------------------------------------------

cdef class End:
    """One end of a pipe: a connection of the standard library, over rings.

    memory: what was mapped, so that the end can travel to another process.   incoming, outgoing: Ring or None.
    bell: this side's descriptor of the socket pair, owned from now on."""

    cdef readonly Memory memory
    cdef Ring incoming
    cdef Ring outgoing
    cdef int bell
    cdef bint watched
    cdef bint broken                    # a message was too long: nothing more is read
    cdef int64_t checked
    cdef uint32_t closes
    cdef object __weakref__

    def __cinit__(self, *arguments, **keywords):
        self.bell = -1

    def __init__(self, Memory memory not None, Ring incoming, Ring outgoing, int bell):
        self.memory = memory
        self.incoming = incoming
        self.outgoing = outgoing
        self.bell = bell

    cdef int check_open(self) except -1:
        if self.bell < 0:
            raise OSError("handle is closed")
        return 0

    cdef int check_readable(self) except -1:
        self.check_open()
        if self.incoming is None or self.broken:
            raise OSError("connection is write-only")
        return 0

    cdef int check_writable(self) except -1:
        self.check_open()
        if self.outgoing is None:
            raise OSError("connection is read-only")
        return 0

    cdef int write(self, Message message) except -1:
        """Put it, for however long that takes. Raises BrokenPipeError when all copies of the other end are closed:
        asked from the kernel when somebody closed one, and now and then, for a process that was killed tells nobody."""
        cdef mp_ring *r = &self.outgoing.r
        cdef uint32_t closes = mp_closes(r)
        cdef int64_t now = mp_now()
        if closes != self.closes or now - self.checked > CHECK_EVERY:
            self.closes = closes
            self.checked = now
            if mp_gone(self.bell):
                failed(MP_ENDED)
        if put(self.outgoing, message, self.bell, 0, MP_FOREVER) == MP_ENDED:
            failed(MP_ENDED)
        return 0

    def send(self, obj):
        """Send a (picklable) object"""
        self.check_writable()
        self.write(of_object(obj))

    def send_bytes(self, buf, offset=0, size=None):
        """Send the bytes data from a bytes-like object"""
        cdef Message message
        self.check_writable()
        if type(buf) is bytes and size is None and type(offset) is int and offset == 0:
            self.write(of_bytes(buf, RAW))
            return
        view = memoryview(buf)
        if view.itemsize > 1:
            view = view.cast("B")
        n = view.nbytes
        if offset < 0:
            raise ValueError("offset is negative")
        if n < offset:
            raise ValueError("buffer length < offset")
        if size is None:
            size = n - offset
        elif size < 0:
            raise ValueError("size is negative")
        elif offset + size > n:
            raise ValueError("buffer length < offset + size")
        view = view[offset:offset + size]
        if not view.contiguous:
            view = view.tobytes()
        message = Message.__new__(Message)
        message.fill([view, b""], [])
        message.m.content = RAW
        self.write(message)

    def recv(self):
        """Receive a (picklable) object"""
        self.check_readable()
        return (<_Taken>get(self.incoming, self.bell, MP_FOREVER)).obj()

    def recv_bytes(self, maxlength=None):
        """
        Receive bytes data as a bytes object.
        """
        cdef bytes data
        self.check_readable()
        if maxlength is not None and maxlength < 0:
            raise ValueError("negative maxlength")
        data = (<_Taken>get(self.incoming, self.bell, MP_FOREVER)).raw()
        if maxlength is not None and len(data) > maxlength:
            if self.outgoing is not None:
                self.broken = True
            else:
                self.close()
            raise OSError("bad message length")
        return data

    def recv_bytes_into(self, buf, offset=0):
        """
        Receive bytes data into a writeable bytes-like object.
        Return the number of bytes read.
        """
        cdef bytes data
        cdef Py_ssize_t size
        self.check_readable()
        with memoryview(buf) as view, view.cast("B") as plain:
            if offset < 0:
                raise ValueError("negative offset")
            if offset > plain.nbytes:
                raise ValueError("offset too large")
            data = (<_Taken>get(self.incoming, self.bell, MP_FOREVER)).raw()
            size = len(data)
            if plain.nbytes < offset + size:
                raise BufferTooShort(data)
            plain[offset:offset + size] = data
            return size

    def poll(self, timeout=0.0):
        """Whether there is any input available to be read"""
        self.check_readable()
        return ready(self.incoming, self.bell, deadline_of(timeout))

    def fileno(self):
        """File descriptor of the connection: readable while there is something to receive, and at the end"""
        cdef int result
        self.check_open()
        if self.incoming is not None and not self.watched:
            with nogil:
                result = mp_watch(&self.incoming.r, self.bell)
            if result != MP_OK:
                failed(result)
            self.watched = True
        return self.bell

    @property
    def rings(self):
        """The incoming and the outgoing ring, or None"""
        return self.incoming, self.outgoing

    @property
    def bell_fd(self):
        """The descriptor, for handing it on"""
        return self.bell

    @property
    def closed(self):
        """True if the connection is closed"""
        return self.bell < 0

    @property
    def readable(self):
        """True if the connection is readable"""
        return self.incoming is not None and not self.broken

    @property
    def writable(self):
        """True if the connection is writable"""
        return self.outgoing is not None

    def close(self):
        """Close the connection"""
        cdef int bell = self.bell
        self.bell = -1
        if bell < 0:
            return
        os.close(bell)
        self.memory.close()
        if self.incoming is not None:   # tell writers to look whether that was the last reader
            mp_reader_closed(&self.incoming.r)

    def __dealloc__(self):
        if self.bell >= 0:
            End.close(self)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()


@cython.final
cdef class Turnstile:
    """A queue's `_rlock`: who has acquired it is the only process that reads, as Pool wants it when it ends.

    It isn't needed for reading, and a process that dies leaves it open."""

    cdef Ring ring

    def __init__(self, Ring ring not None):
        self.ring = ring

    def acquire(self, block=True, timeout=None):
        """Keep other processes from reading. Returns whether that worked in time."""
        cdef mp_ring *r = &self.ring.r
        cdef int64_t deadline = deadline_of(timeout) if block else 0
        cdef int result
        while True:
            with nogil:
                result = mp_lock_take(r, deadline if deadline else mp_now() + 1000000)
            if result == MP_OK:
                if not mp_barred(r):
                    mp_bar(r, os.getpid())
                    mp_release(&r.s.take)
                    return True
                mp_release(&r.s.take)
                if deadline == 0 or mp_now() >= deadline:
                    return False
                with nogil:
                    mp_wait_barred(r, deadline)
            elif result == MP_TIMEDOUT:
                return False
            elif result != MP_INTERRUPTED:
                failed(result)
            PyErr_CheckSignals()

    def release(self):
        """Let others read again."""
        mp_bar(&self.ring.r, 0)

    def __enter__(self):
        return self.acquire()

    def __exit__(self, kind, error, trace):
        self.release()


# ---- queues ---------------------------------------------------------------------------------------------------------

cdef class SimpleCore:
    """What SimpleQueue does all the time."""

    cdef public End _reader
    cdef public End _writer
    cdef object __weakref__

    def get(self):
        """Remove and return the next object; waits for one. Raises EOFError when no process is left to put one."""
        self._reader.check_readable()
        return (<_Taken>get(self._reader.incoming, self._reader.bell, MP_FOREVER)).obj()

    def put(self, obj):
        """Put an object, waiting while the queue's memory is full. Raises what pickling it raises."""
        self._writer.check_writable()
        if put(self._writer.outgoing, of_object(obj), self._writer.bell, 0, MP_FOREVER) == MP_ENDED:
            failed(MP_ENDED)

    def empty(self):
        """Whether there is nothing to get now."""
        return not self._reader.poll()


cdef class Core:
    """What Queue does while its messages fit into the ring; `_overflow` of the subclass does the rest."""

    cdef public End _reader
    cdef public End _writer
    cdef public object _maxsize
    cdef public bint _closed
    cdef public bint _used
    cdef public object _buffer          # messages that wait in this process
    cdef uint64_t most
    cdef int64_t patience
    cdef mp_slot *slot
    cdef object __weakref__

    def __cinit__(self, *arguments, **keywords):
        # How long a put looks for room before it leaves the message to a thread: half of it after each time in vain.
        self.patience = 5000000

    def _limit(self, most):
        self.most = most

    def put(self, obj, block=True, timeout=None):
        """Put an object. Waits only while `maxsize` objects are there: raises queue.Full when that lasts longer than
        `timeout` seconds, or at once unless `block`. Raises what pickling it raises; ValueError when closed."""
        cdef Message message
        cdef int64_t deadline, patience = self.patience
        cdef int result
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        self._used = True
        if not block and patience > 100000:
            patience = 100000
        try:
            message = of_object(obj)
        except Exception as error:
            self._not_pickled(error, obj)
            return
        if self._buffer and not self._caught_up(patience / 1e9):
            result = MP_BUSY            # stay behind what waits
        else:
            result = self.try_put(message, patience, block)
        if result == MP_TIMEDOUT:
            deadline = deadline_of(timeout) if block else 0
            while result == MP_TIMEDOUT:
                self.wait_slot(deadline)
                result = self.try_put(message, patience, block)
            if deadline != MP_FOREVER:
                timeout = (deadline - mp_now()) / 1e9
        if result == MP_OK:
            if self.patience < 5000000:
                self.patience += self.patience >> 3
        elif result == MP_BUSY:
            if self.patience > 20000:
                self.patience >>= 1
            self._overflow(message.flat(), message.m.content, message.m.buffers, block, timeout)
        else:
            self._no_reader()

    cdef int try_put(self, Message message, int64_t patience, bint block) except -1:
        """Put it into the ring, waiting for a reader as long as it goes on reading, at most about a second."""
        cdef mp_ring *r = &self._writer.outgoing.r
        cdef uint64_t tail = mp_progress(r)
        cdef int result = put(self._writer.outgoing, message, self._writer.bell, self.most, patience)
        cdef int64_t end
        if result == MP_BUSY and block and message.m.total < r.size // 8 * 5:
            end = mp_now() + 1000000000
            while result == MP_BUSY and mp_progress(r) != tail and mp_now() < end:
                tail = mp_progress(r)
                result = put(self._writer.outgoing, message, self._writer.bell, self.most, patience)
        return result

    def _reading(self):
        """A number that changes while somebody reads."""
        return mp_progress(&self._writer.outgoing.r)

    cdef int wait_slot(self, int64_t deadline) except -1:
        """Wait until fewer than `maxsize` may be there; raises Full at the deadline (0: now)."""
        cdef mp_ring *r = &self._writer.outgoing.r
        cdef int bell = self._writer.bell, result
        if deadline == 0:
            raise Full
        with nogil:
            result = mp_wait_slot(r, self.most, bell, deadline)
        PyErr_CheckSignals()
        if result == MP_TIMEDOUT:
            raise Full
        elif result == MP_ENDED:
            self._no_reader()
            raise Full
        return 0

    def get(self, block=True, timeout=None):
        """Remove and return the next object. Waits for one: raises queue.Empty when that takes longer than `timeout`
        seconds, or at once unless `block`. Raises ValueError when closed, and what unpickling raises."""
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        self._reader.check_readable()
        taken = get(self._reader.incoming, self._reader.bell, deadline_of(timeout) if block else 0)
        if taken is _EMPTY:
            raise Empty
        return (<_Taken>taken).obj()

    def put_nowait(self, obj):
        """put(obj, block=False)"""
        return self.put(obj, False)

    def get_nowait(self):
        """get(block=False)"""
        return self.get(False)

    def qsize(self):
        """How many objects were put and not taken yet, at this moment."""
        self._reader.check_open()
        return mp_items(self._reader.incoming.r.s)

    def empty(self):
        """Whether there is nothing to get now."""
        return not self._reader.poll()

    def full(self):
        """Whether `maxsize` objects are there now."""
        self._reader.check_open()
        return self.most != 0 and mp_items(self._reader.incoming.r.s) >= self.most

    # For the thread that feeds the ring with what didn't fit.

    def _slot_take(self):
        """Called by the feeder. Whether it may count its messages: false when too many processes have one."""
        self.slot = mp_slot_take(&self._writer.outgoing.r)
        return self.slot != NULL

    def _slot_release(self):
        """Called by the feeder at its end."""
        cdef mp_slot *slot = self.slot
        self.slot = NULL
        if slot != NULL:
            slot.count = 0
            mp_release(&slot.lock)

    def _slot_forget(self):
        """In a forked child: the slot is the parent's."""
        self.slot = NULL

    def _slot_reserve(self):
        """Count a message that this process will feed. False: `maxsize` are there, or nobody can count them now."""
        cdef mp_ring *r = &self._writer.outgoing.r
        cdef int result
        with nogil:
            result = mp_reserve(r, self.slot, self.most, 5000000)
        if result == MP_OK:
            return True
        if result != MP_TIMEDOUT and result != MP_INTERRUPTED:
            failed(result)
        return False

    def _slot_wait(self, int64_t deadline):
        """Wait until it is worth trying again. Raises Full at the deadline (0: now), and runs signal handlers."""
        self.wait_slot(deadline)

    def _deadline(self, block, timeout):
        """When a wait for `timeout` seconds ends, for _slot_wait."""
        return deadline_of(timeout) if block else 0

    def _put_flat(self, bytes data, int content, int buffers, bint counted, double patience):
        """Put what `_overflow` was given. `counted`: by the feeder, whose message was counted. Whether it went within
        `patience` seconds; BrokenPipeError when no reader is left."""
        cdef Message message = of_flat(data, content, buffers)
        cdef int result
        if counted:
            message.m.slot = self.slot
        result = put(self._writer.outgoing, message, self._writer.bell, 0, <int64_t>(patience * 1e9))
        if result == MP_ENDED:
            failed(result)
        return result == MP_OK

    def _wait_room(self, Py_ssize_t size, double seconds):
        """Wait until `size` bytes, or half of the ring, are free."""
        cdef mp_ring *r = &self._writer.outgoing.r
        cdef uint64_t need = size + 64 if <uint64_t>size + 64 < r.size // 2 else r.size // 2
        cdef int64_t deadline = mp_now() + <int64_t>(seconds * 1e9)
        cdef int bell = self._writer.bell, result
        with nogil:
            result = mp_wait_room(r, need, bell, deadline)
        if result == MP_ENDED:
            failed(result)

    # For JoinableQueue.

    def _task_done(self):
        return mp_task_done(&self._reader.incoming.r) == MP_OK

    def _join(self):
        cdef mp_ring *r = &self._reader.incoming.r
        cdef int result = MP_BUSY
        while result != MP_OK:
            with nogil:
                result = mp_join(r)
            PyErr_CheckSignals()
