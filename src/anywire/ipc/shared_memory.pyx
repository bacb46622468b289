# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Shared memory: POSIX objects, memory-mapped files, and anonymous memory with seals (shm_overview(7), mmap(2), memfd_create(2)).

A SharedMemory is a descriptor and its mapping, and gives out the bytes by the buffer protocol. While somebody has a view of
them they stay where they are: closing and resizing are refused then. Nothing but an owner, or `unlink`, removes a name.

Any thread; the bytes are as safe as what is done with them: put a Mutex or Semaphore in front, or inside.

What can go wrong: touching memory that another process has cut off kills with SIGBUS (seal anonymous memory against that);
memory that is not reserved may kill so too, when the file system is full.
"""
from libc.errno cimport EACCES, EINTR, EINVAL, ENODEV, ENOMEM, ENOSPC, EOPNOTSUPP, errno
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_FillInfo, Py_buffer
from cpython.exc cimport PyErr_CheckSignals, PyErr_WarnEx
from anywire.ipc._system cimport encoded, fail, failure, refusal

import cython
import fcntl
import math
import os
import stat

from anywire.ipc.processes import processes_of
from anywire.ipc.unlinking import Unlink

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <sys/mman.h>
    #include <unistd.h>
    #ifndef MFD_NOEXEC_SEAL
    #define MFD_NOEXEC_SEAL 8u
    #endif
    """

cdef extern from "<sys/mman.h>" nogil:
    ctypedef unsigned int mode_t
    int PROT_READ, PROT_WRITE, MAP_SHARED, MREMAP_MAYMOVE, MS_SYNC, MADV_HUGEPAGE
    unsigned int MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_HUGETLB, MFD_NOEXEC_SEAL
    void *MAP_FAILED
    void *mmap(void *at, size_t length, int protection, int flags, int fd, long offset)
    void *mremap(void *at, size_t before, size_t after, int flags, ...)
    int munmap(void *at, size_t length)
    int msync(void *at, size_t length, int flags)
    int madvise(void *at, size_t length, int advice)
    int shm_open(const char *name, int flags, mode_t mode)
    int shm_unlink(const char *name)
    int memfd_create(const char *name, unsigned int flags)

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, long long offset, long long length)

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef int O_RDONLY = os.O_RDONLY, O_RDWR = os.O_RDWR, O_CREAT = os.O_CREAT, O_EXCL = os.O_EXCL, O_TRUNC = os.O_TRUNC
cdef int ACCESS = os.O_ACCMODE
cdef char nothing[1]                   # where 0 bytes are

_SEALS = {
    "seal": 1,
    "shrink": 2,
    "grow": 4,
    "write": 8,
    "future_write": 16,
}


def remove(name):
    """Remove the name. The memory stays for those who have it open; the next object of this name is another.

    Raises FileNotFoundError, PermissionError.
    """
    cdef bytes raw = encoded(name, "shared memory", "/frames")
    if shm_unlink(raw):
        raise refusal(errno, name, 255, "shared memory object", False)


@cython.no_gc                     # refers to a str only, which it needs to the end
cdef class SharedMemory:
    """Memory that processes share; bytes by the buffer protocol: `memoryview(memory)`, `memory[10:20]`, `memory.array(...)`.

    Args:
        name: as "/frames": one slash, then up to 255 bytes without one.
        flags: os.O_RDWR or os.O_RDONLY, with os.O_CREAT, os.O_EXCL, os.O_TRUNC.
        mode: permissions of a new object, less the umask.
        size: bytes; None takes the object as it is. An existing object that has another size: ValueError, unless it has 0
            bytes, as a new one has: then it gets this size.
        reserve: whether the memory is taken from the system now, so that there is an OSError (ENOSPC) instead of a SIGBUS
            when the first touch finds none.
        huge: ask for huge pages (madvise(2); the kernel may not heed it).
        owner: whether `close` removes the name, in the process that opened it.

    Thread-safe but for the bytes. After a fork both processes have it mapped; only the process that opened it is its owner.
    Pickled, it opens the same name again; anonymous memory refuses (TypeError): pass its descriptor.

    >>> with SharedMemory.create("/anywire-example", 100, owner=True) as memory:
    ...     memory[:5] = b"hello"
    ...     with SharedMemory.open("/anywire-example", readonly=True) as same:
    ...         same.size, bytes(same[:5])
    (100, b'hello')

    Raises:
        FileNotFoundError, FileExistsError, PermissionError: as the flags say; PermissionError for os.O_WRONLY, too.
        OSError: a name that can't be one (EINVAL, ENAMETOOLONG), no memory (ENOMEM, ENOSPC), no descriptors (EMFILE).
    """
    cdef char *at                       # NULL: closed, or of 0 bytes
    cdef Py_ssize_t length
    cdef Py_ssize_t views
    cdef int fd, owner_pid
    cdef bint writable, huge, is_file
    cdef readonly object name
    cdef object __weakref__

    unlink = Unlink(remove)

    def __cinit__(self):
        self.fd = -1

    def __init__(self, name, flags=O_RDWR, mode=0o600, size=None, *, reserve=True, huge=False, owner=False):
        cdef bytes raw = encoded(name, "shared memory", "/frames")
        cdef const char *text = raw
        cdef int how = flags, fd, e
        cdef mode_t bits = mode
        if self.fd >= 0:
            raise RuntimeError("this shared memory is open already")
        check_access(how, name)
        with nogil:
            fd = shm_open(text, how, bits)
            e = errno
        if fd < 0:
            raise refusal(e, name, 255, "shared memory object", not how & O_CREAT)
        self.name = name
        try:
            self.settle(fd, how & ACCESS == O_RDWR, size, reserve, huge)
        except BaseException:
            # What nobody has seen yet leaves nothing behind; with O_CREAT alone it may be another's.
            if how & O_CREAT and how & O_EXCL:
                shm_unlink(raw)
            raise
        self.owner_pid = os.getpid() if owner else 0

    @classmethod
    def create(cls, name, size, mode=0o600, *, reserve=True, huge=False, owner=False):
        """Make a new object of so many bytes, all 0. FileExistsError: the name is taken."""
        return cls(name, O_RDWR | O_CREAT | O_EXCL, mode, size, reserve=reserve, huge=huge, owner=owner)

    @classmethod
    def open(cls, name, *, readonly=False, huge=False, owner=False):
        """Open an existing object, of the size that it has. FileNotFoundError: there is none."""
        return cls(name, O_RDONLY if readonly else O_RDWR, 0, None, huge=huge, owner=owner)

    @classmethod
    def create_or_open(cls, name, size, mode=0o600, *, reserve=True, huge=False, owner=False):
        """Open it, or make it if there is none. ValueError: there is one, of another size."""
        return cls(name, O_RDWR | O_CREAT, mode, size, reserve=reserve, huge=huge, owner=owner)

    @classmethod
    def anonymous(cls, size, label="anywire", *, reserve=True, huge=False, sealable=True):
        """Memory without a name, for whoever gets its descriptor (memfd_create(2)).

        Args:
            size: bytes.
            label: shown in /proc/PID/maps.
            huge: True takes real huge pages: `size` is a multiple of theirs, and the system must have some set aside
                (/proc/sys/vm/nr_hugepages), else OSError (ENOMEM).
            sealable: whether `seal` will be allowed.
        """
        cdef SharedMemory made = cls.__new__(cls)
        cdef bytes raw = os.fsencode(label)
        cdef unsigned int how = MFD_CLOEXEC | (MFD_ALLOW_SEALING if sealable else 0) | (MFD_HUGETLB if huge else 0)
        # The kernel asks for a word about execution since Linux 6.3, and refuses it before that. It implies sealing.
        cdef int fd = memfd_create(raw, how | MFD_NOEXEC_SEAL) if sealable else -1
        if fd < 0:
            fd = memfd_create(raw, how)
        if fd < 0:
            fail(errno, None, "memfd_create")
        made.settle(fd, True, size, reserve or huge, False)
        return made

    @classmethod
    def file(cls, path, size=None, *, readonly=False, create=False, mode=0o600, reserve=True):
        """A file, mapped: what is written is in the file, and `flush` waits until it is on the disk.

        Args:
            path: of a regular file; it is `name`, and pickled it is opened again.
            size: bytes. None takes the file as it is; a shorter file grows, a longer one: ValueError.
            create: make it if there is none.
        """
        cdef SharedMemory made = cls.__new__(cls)
        cdef int how = O_RDONLY if readonly else O_RDWR
        path = os.fspath(path)
        fd = os.open(path, how | (O_CREAT if create else 0) | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, mode)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                fail(ENODEV, path, "only a regular file can be mapped here")
        except BaseException:
            os.close(fd)
            raise
        made.name = path
        made.is_file = True
        made.settle(fd, not readonly, size, reserve, False, grows=True)
        return made

    @classmethod
    def from_fd(cls, fd, *, readonly=False):
        """Memory whose descriptor came from elsewhere: of the size that it has. The descriptor is this object's from now on."""
        cdef SharedMemory made = cls.__new__(cls)
        made.settle(fd, not readonly, None, False, False)
        return made

    cdef int settle(self, int fd, bint writable, object size, bint reserve, bint huge, bint grows=False) except -1:
        """Take the descriptor, give the object its size, map it; if that fails, close it."""
        cdef Py_ssize_t here
        self.fd, self.writable, self.huge = fd, writable, huge
        try:
            here = os.fstat(fd).st_size
            if size is not None:
                if size < 0:
                    raise ValueError(f"the size of shared memory is a number of bytes, not {size}")
                if here != size:
                    if here and not (grows and here < size):
                        raise ValueError(f"{self.who()} has {here} bytes already, not {size}: open it as it is, or resize it")
                    if not writable:
                        raise ValueError(f"{self.who()} has {here} bytes, and is opened for reading only: it can't get {size}")
                    os.ftruncate(fd, size)
                    if reserve:
                        self.take(here, size)
                    here = size
            self.map(here)
        except BaseException:
            c_close(fd)
            self.fd = -1
            raise
        return 0

    cdef int take(self, long long start, long long end) except -1:
        """Take the memory from the system. What can't do that (EOPNOTSUPP) goes without."""
        cdef int done, e
        while True:
            with nogil:
                done = fallocate(self.fd, 0, start, end - start)
                e = errno
            if done == 0 or e == EOPNOTSUPP:
                return 0
            if e != EINTR:
                os.ftruncate(self.fd, start)
                return fail(e, self.name, f"no room for {end - start} bytes more: see `df` of its file system (/dev/shm?)"
                            if e == ENOSPC or e == ENOMEM else None)
            PyErr_CheckSignals()

    cdef int map(self, Py_ssize_t length) except -1:
        cdef int protection = PROT_READ | PROT_WRITE if self.writable else PROT_READ
        cdef void *at
        self.at, self.length = NULL, 0
        if length:                      # mmap(2) refuses 0 bytes
            at = mmap(NULL, length, protection, MAP_SHARED, self.fd, 0)
            if at == MAP_FAILED:
                return fail(errno, self.name, {
                    ENOMEM: f"no room for {length} bytes (for huge pages: /proc/sys/vm/nr_hugepages)",
                    EACCES: "its descriptor does not allow this: is it open for reading only?",
                }.get(errno))
            if self.huge:
                madvise(at, length, MADV_HUGEPAGE)      # EINVAL: a kernel without them
            self.at, self.length = <char *> at, length
        return 0

    # -- what it is

    @property
    def size(self):
        """Bytes that are mapped here: the exact size, not rounded up to pages. ValueError: it is closed."""
        self.check()
        return self.length

    @property
    def readonly(self):
        """Whether it was opened for reading only."""
        return not self.writable

    @property
    def closed(self):
        """Whether it was closed here."""
        return self.fd < 0

    @property
    def mode(self):
        """Its permissions."""
        self.check()
        return stat.S_IMODE(os.fstat(self.fd).st_mode)

    def fileno(self):
        """Its descriptor, to be passed on, or asked by fstat(2). ValueError: it is closed."""
        self.check()
        return self.fd

    def processes(self):
        """The processes that have it mapped, by number, of those that we may look at."""
        self.check()
        status = os.fstat(self.fd)
        return processes_of(status.st_dev, status.st_ino)

    def __len__(self):
        self.check()
        return self.length

    # -- its bytes

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.check()
        if not self.writable and flags & PyBUF_WRITABLE:
            raise BufferError("this shared memory was opened for reading only")
        PyBuffer_FillInfo(buffer, self, self.at if self.at is not NULL else nothing, self.length, not self.writable, flags)
        self.views += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.views -= 1

    def __getitem__(self, index):
        """A byte as an int, or some as a memoryview."""
        return memoryview(self)[index]

    def __setitem__(self, index, value):
        with memoryview(self) as whole:
            whole[index] = value

    def array(self, dtype, shape=None, offset=0):
        """A NumPy array of these bytes, not a copy. It keeps the memory from being closed.

        Args:
            dtype: of the elements.
            shape: int or tuple; None takes as many elements as there is room for.
            offset: bytes before the first one.

        Raises ImportError: NumPy is not installed. ValueError: there is no room for it.
        """
        import numpy

        of = numpy.dtype(dtype)
        if shape is None:
            shape = max(0, self.length - offset) // of.itemsize
        count = math.prod(shape) if isinstance(shape, tuple) else shape
        if offset < 0 or count < 0 or offset + count * of.itemsize > self.length:
            raise ValueError(f"no room for {shape} elements of {of} at offset {offset} of {self.length} bytes")
        # numpy.ndarray(buffer=) would not keep it exported, and read what was unmapped.
        return numpy.frombuffer(self, of, count, offset).reshape(shape) if count else numpy.empty(shape, of)

    # -- changing

    def resize(self, size, *, reserve=True):
        """Make it longer (the new bytes are 0) or shorter, for all; others see more of it after `refresh`.

        Whoever touches what was cut off is killed by SIGBUS, in any process. BufferError: there are views of it here.
        OSError: no room (ENOSPC), or sealed (EPERM).
        """
        cdef long long before
        self.check()
        self.check_views("resized")
        if size < 0:
            raise ValueError(f"the size of shared memory is a number of bytes, not {size}")
        try:
            before = os.fstat(self.fd).st_size
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise failure(error.errno, self.name, "it is open for reading only, or sealed") from None
        if reserve and size > before:
            self.take(before, size)
        self.remap(size)

    def refresh(self):
        """Map it as long as it is now: after another process has resized it. Returns the size. BufferError as `resize`."""
        cdef Py_ssize_t size
        self.check()
        size = os.fstat(self.fd).st_size
        if size != self.length:
            self.check_views("mapped anew")
            self.remap(size)
        return self.length

    cdef int remap(self, Py_ssize_t size) except -1:
        cdef void *at
        if self.at is NULL:
            return self.map(size)
        if size == 0:
            munmap(self.at, self.length)
            self.at, self.length = NULL, 0
            return 0
        at = mremap(self.at, self.length, size, MREMAP_MAYMOVE)
        if at == MAP_FAILED:
            return fail(errno, self.name, f"mapping {size} bytes")
        self.at, self.length = <char *> at, size
        return 0

    def flush(self):
        """Wait until what was written is on the disk, for a file (msync(2)). OSError: it isn't."""
        cdef int done, e
        cdef char *at = self.at
        cdef Py_ssize_t length = self.length
        self.check()
        if at is NULL:
            return
        self.views += 1                 # it stays mapped meanwhile
        with nogil:
            done = msync(at, length, MS_SYNC)
            e = errno
        self.views -= 1
        if done:
            fail(e, self.name, "msync")

    def seal(self, *what):
        """Promise for good, to all who have it, what will not happen: "shrink", "grow", "write", "future_write", "seal".

        Without "write", but with "future_write", those who have it mapped for writing go on. OSError: EPERM: it is not
        sealable, or "seal" was promised; EBUSY: "write", while it is mapped for writing (also here).
        """
        cdef int bits = 0
        self.check()
        for each in what:
            if each not in _SEALS:
                raise ValueError(f"no seal is called {each!r}; there are {', '.join(_SEALS)}")
            bits |= _SEALS[each]
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, bits)
        except OSError as error:
            raise failure(error.errno, self.name, "sealing " + ", ".join(what)) from None

    @property
    def seals(self):
        """The promises made, as a frozenset of names. Empty for what has none, such as files."""
        self.check()
        try:
            bits = fcntl.fcntl(self.fd, fcntl.F_GET_SEALS)
        except OSError as error:
            if error.errno == EINVAL:
                return frozenset()
            raise
        return frozenset([name for name, bit in _SEALS.items() if bits & bit])

    # -- the end

    cdef object who(self):
        return "this memory" if self.name is None else f"the shared memory {self.name}"

    cdef int check(self) except -1:
        if self.fd < 0:
            raise ValueError("this shared memory is closed")
        return 0

    cdef int check_views(self, str what) except -1:
        if self.views:
            raise BufferError(
                f"{self.who()} can't be {what} while {self.views} views of it are in use: memoryviews, arrays, semaphores and"
                " locks in it; release or close them first"
            )
        return 0

    def close(self):
        """Unmap it and close its descriptor; also when that is done already. An owner removes the name.

        BufferError: there are views of it here; nothing was done.
        """
        if self.fd < 0:
            return
        self.check_views("closed")
        self.let_go()
        if self.owner_pid and self.owner_pid == os.getpid():
            try:
                remove(self.name)
            except FileNotFoundError:
                pass

    cdef void let_go(self) noexcept:
        if self.at is not NULL:
            munmap(self.at, self.length)
            self.at = NULL
        self.length = 0
        if self.fd >= 0:
            c_close(self.fd)
            self.fd = -1

    def __enter__(self):
        self.check()
        return self

    def __exit__(self, kind, error, trace):
        self.close()

    def __dealloc__(self):
        if self.fd >= 0:
            PyErr_WarnEx(ResourceWarning, "shared memory was never closed", 1)
            if self.owner_pid and self.owner_pid == os.getpid():
                shm_unlink(<bytes> os.fsencode(self.name))
        self.let_go()

    def __reduce__(self):
        if self.name is None:
            raise TypeError("anonymous memory can't be pickled: pass its descriptor to the other process, and take it by from_fd")
        return _reopen, (self.name, self.is_file, not self.writable)

    def __repr__(self):
        if self.fd < 0:
            return "<SharedMemory, closed>"
        what = "anonymous" if self.name is None else repr(self.name)
        return f"<SharedMemory {what}, {self.length} bytes{'' if self.writable else ', read-only'}>"


def _reopen(name, is_file, readonly):
    """In the process that unpickles it."""
    return (SharedMemory.file if is_file else SharedMemory.open)(name, readonly=readonly)


cdef int check_access(int flags, object name) except -1:
    if flags & ACCESS not in (O_RDONLY, O_RDWR):
        return fail(EACCES, name, "memory that can be written only can't be mapped: take os.O_RDWR or os.O_RDONLY")
    if flags & ~(ACCESS | O_CREAT | O_EXCL | O_TRUNC):
        raise ValueError(f"flags of shared memory are O_RDONLY or O_RDWR, with O_CREAT, O_EXCL, O_TRUNC; not {flags:#o}")
    if flags & O_TRUNC and flags & ACCESS == O_RDONLY:
        raise ValueError("O_TRUNC needs O_RDWR: POSIX leaves open what it does otherwise")
    return 0
