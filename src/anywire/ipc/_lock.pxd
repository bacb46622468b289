# What locks in shared memory share: their place, with a name or in a buffer, its checks, and its end.
from libc.stdint cimport int32_t, int64_t, uint32_t
from cpython.buffer cimport Py_buffer

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_rwlock_t:
        pass
    int pthread_mutex_unlock(pthread_mutex_t *m)
    int pthread_mutex_consistent(pthread_mutex_t *m)
    int pthread_cond_signal(pthread_cond_t *c)
    int pthread_cond_broadcast(pthread_cond_t *c)
    int pthread_rwlock_tryrdlock(pthread_rwlock_t *l)
    int pthread_rwlock_trywrlock(pthread_rwlock_t *l)
    int pthread_rwlock_unlock(pthread_rwlock_t *l)

cdef extern from "anywire/ipc/locks.h" nogil:
    enum:
        AW_LOCK_SIZE, AW_MUTEX, AW_CONDITION, AW_RWLOCK, AW_LOCK, AW_READ, AW_WRITE
    ctypedef union aw_c:
        pthread_mutex_t mutex
        pthread_cond_t condition
        pthread_rwlock_t rwlock
    struct aw_lock:
        aw_c c
    int aw_no_clocklock
    void aw_begin_lock(aw_lock *l, int kind)
    void aw_finish_lock(aw_lock *l, int kind)
    int aw_check_lock(aw_lock *l, int kind)
    int aw_make_mutex(pthread_mutex_t *m)
    int aw_make_condition(pthread_cond_t *c)
    int aw_make_rwlock(pthread_rwlock_t *l, int prefer_writers)
    int aw_mutex_try(aw_lock *l)
    uint32_t aw_notifications(aw_lock *l)
    void aw_count_notification(aw_lock *l)
    int aw_lock_wait(aw_lock *l, int how, int64_t deadline)
    int aw_condition_wait(aw_lock *c, aw_lock *m, int64_t deadline)
    int32_t aw_writer(aw_lock *l)
    void aw_set_writer(aw_lock *l, int32_t pid)

cdef int forks                          # how many processes lie between this one and the first


cdef class Lock:
    cdef aw_lock *at                    # NULL: closed
    cdef aw_lock *place                 # until it is closed and nobody is inside
    cdef Py_buffer view
    cdef int users, owner_pid
    cdef int held                       # how often it is locked through this object, by this process
    cdef int passing                    # calls of cancelled tasks that still go on: what they hold they give back
    cdef int generation                 # of the process that the three belong to
    cdef object memory                  # a SharedMemory, of one with a name
    cdef readonly object name
    cdef public object _tasks           # of lock_tasks
    cdef object __weakref__

    cdef int kind(self) noexcept
    cdef int make(self) except -1
    cdef int begin(self, object name, object flags, object mode, bint owner) except -1
    cdef int settle(self, object buffer, object offset, bint new) except -1
    cdef int refuse(self) except -1
    cdef void look(self) noexcept
    cdef aw_lock *still(self) except NULL
    cdef void enter(self) noexcept
    cdef int leave(self) except -1
    cdef int part(self) except -1
    cdef int put(self, str path, object mode, int how) except -1
    cdef int end(self) except -1
    cdef void let_go(self) noexcept
