# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""What locks in shared memory share: their place, with a name or in a buffer, its checks, and its end.

A lock with a name is a POSIX shared memory object of its own. It gets the name when it is complete (linkat(2)), so nobody
ever opens a half-made one. What is opened is checked: a magic word, a version, sizes.

Any thread. The memory stays until the lock is closed and nobody is inside a call. What can go wrong: another process writes
over the memory, against which nothing helps.
"""
from cpython.buffer cimport PyBuffer_Release
from cpython.exc cimport PyErr_WarnEx
from libc.errno cimport EBUSY, EEXIST, EINVAL, ENAMETOOLONG
from anywire.ipc._place cimport take_place
from anywire.ipc._system cimport fail

import cython
import os

from anywire.ipc.processes import processes_with
from anywire.ipc.shared_memory import SharedMemory, remove
from anywire.ipc.unlinking import Unlink

cdef int O_CREAT = os.O_CREAT, O_EXCL = os.O_EXCL

def _forked():
    global forks
    forks += 1


os.register_at_fork(after_in_child=_forked)

cdef str DIRECTORY = "/dev/shm"           # where glibc and musl have POSIX shared memory: shm_overview(7)


cdef str path_of(object name):
    """The file that stands for this name. OSError: it can't be one."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a lock is a str such as '/accounts', not {type(name).__name__}")
    bare = name.lstrip("/")
    if not bare or "/" in bare or bare in (".", ".."):
        fail(EINVAL, name, "a name is a slash and up to 255 bytes without one")
    if len(os.fsencode(bare)) > 255:
        fail(ENAMETOOLONG, name, "a name has at most 255 bytes behind its slash")
    return f"{DIRECTORY}/{bare}"


@cython.no_gc_clear               # `close` needs all that it refers to
cdef class Lock:
    """The base of Mutex, Condition and RWLock; not made by users."""

    SIZE = AW_LOCK_SIZE
    unlink = Unlink(remove)

    cdef int kind(self) noexcept:
        return AW_MUTEX

    cdef int make(self) except -1:
        """Make the C library's object at `at`."""
        raise NotImplementedError

    cdef int begin(self, object name, object flags, object mode, bint owner) except -1:
        """By name and flags."""
        cdef int how = flags
        path = path_of(name)
        if self.place is not NULL:
            raise RuntimeError("this lock is open already")
        if how & ~(O_CREAT | O_EXCL):
            raise ValueError(f"flags of a lock are os.O_CREAT and os.O_EXCL, not {flags:#o}")
        self.name = name
        while True:
            if not how & O_EXCL:
                try:
                    self.memory = SharedMemory.open(name)
                except FileNotFoundError:
                    if not how & O_CREAT:
                        raise
                else:
                    try:
                        self.settle(self.memory, 0, False)
                    except BaseException:
                        self.memory.close()
                        raise
                    break
            if self.put(path, mode, how):
                break
        self.owner_pid = os.getpid() if owner else 0
        return 0

    cdef int put(self, str path, object mode, int how) except -1:
        """Make one and give it the name, if that is free: 1, else 0, or FileExistsError if it must be."""
        fd = os.open(DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
        try:
            os.ftruncate(fd, AW_LOCK_SIZE)
            memory = SharedMemory.from_fd(os.dup(fd))
            try:
                self.settle(memory, 0, True)
                # A directory's descriptor, which an absolute path does not need, makes this linkat(2) follow the link.
                os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
            except FileExistsError:
                self.let_go()
                memory.close()
                if how & O_EXCL:
                    fail(EEXIST, self.name, "something of this name exists (open, or create_or_open, uses it)")
                return 0
            except BaseException:
                self.let_go()
                memory.close()
                raise
            self.memory = memory
            return 1
        finally:
            os.close(fd)

    cdef int settle(self, object buffer, object offset, bint new) except -1:
        """Take the place; make the lock there, or check the one that is there."""
        cdef str what = type(self).__name__
        cdef int found
        self.place = <aw_lock *> take_place(&self.view, buffer, offset, AW_LOCK_SIZE, 8, what)
        self.at = self.place
        self.generation = forks
        try:
            if new:
                aw_begin_lock(self.at, self.kind())
                self.make()
                aw_finish_lock(self.at, self.kind())
            else:
                found = aw_check_lock(self.at, self.kind())
                if found == 1:
                    raise ValueError(f"there is no {what} here ({self.name or f'offset {offset}'}), or it was never made")
                if found == 2:
                    raise ValueError(f"this {what} was made by a program with another C library, whose locks have another size")
        except BaseException:
            self.let_go()
            raise
        return 0

    cdef int refuse(self) except -1:
        raise ValueError(f"this {type(self).__name__} is closed")

    @property
    def closed(self):
        """Whether it was closed here."""
        return self.at is NULL

    def processes(self):
        """The processes that have it mapped, by number, of those that we may look at. ValueError: it has no name."""
        if self.name is None:
            raise ValueError(f"this {type(self).__name__} has no name: ask its shared memory for its processes")
        return processes_with(path_of(self.name))

    cdef void look(self) noexcept:
        """Before looking at who uses it: a forked child has it open, but none of its parent's threads."""
        if self.generation != forks:
            self.generation = forks
            self.held = self.users = self.passing = 0

    cdef aw_lock *still(self) except NULL:
        """The place, for who got it, or had it, when it was closed here: he gives it back."""
        self.look()
        if self.place is NULL or not self.held:
            self.refuse()
        return self.place

    def _enter(self):
        if self.at is NULL:
            self.refuse()
        self.enter()

    def _leave(self):
        self.leave()

    def _pass(self, int calls):
        """So many calls more (or less) go on that a cancelled task left behind."""
        self.look()
        self.passing += calls

    cdef void enter(self) noexcept:
        """Somebody is inside a call: the memory stays until `leave`."""
        self.look()
        self.users += 1

    cdef int leave(self) except -1:
        self.look()
        if self.users:                  # else it was the parent's
            self.users -= 1
        return self.part()

    cdef int part(self) except -1:
        """The end, if it was closed and nobody is inside. Held, it is in a list that the kernel follows: it stays."""
        if self.at is NULL and self.users == 0 and self.held == 0:
            self.end()
        return 0

    cdef void let_go(self) noexcept:
        self.at = NULL
        if self.place is not NULL:
            PyBuffer_Release(&self.view)
            self.place = NULL

    cdef int end(self) except -1:
        self.let_go()
        if self.memory is not None:
            self.memory.close()
            self.memory = None
        return 0

    def close(self):
        """Stop using it here; also when it is closed already. An owner removes the name.

        OSError (EBUSY): it is locked through this object. Threads that wait go on, and give back what they get; the memory
        stays until they are done.
        """
        if self.at is NULL:
            return
        self.look()
        if self.held and not self.passing:
            fail(EBUSY, self.name, f"this {type(self).__name__} is locked here: unlock it first")
        self.at = NULL
        self.part()
        if self.owner_pid and self.owner_pid == os.getpid():
            try:
                remove(self.name)
            except FileNotFoundError:
                pass

    def __dealloc__(self):
        if self.at is not NULL:
            PyErr_WarnEx(ResourceWarning, "a lock was never closed", 1)
            if self.owner_pid and self.owner_pid == os.getpid():
                try:
                    remove(self.name)
                except OSError:
                    pass
        self.look()
        if self.place is not NULL and not self.held:     # a held one stays mapped: see `part`
            self.let_go()
            if self.memory is not None:
                self.memory.close()

    def __reduce__(self):
        if self.name is None:
            raise TypeError(f"a {type(self).__name__} without a name can't be pickled: pickle its memory, and open_in it there")
        return type(self).open, (self.name,)

    def __repr__(self):
        what = repr(self.name) if self.name is not None else "in a buffer"
        return f"<{type(self).__name__} {what}{', closed' if self.at is NULL else ''}>"
