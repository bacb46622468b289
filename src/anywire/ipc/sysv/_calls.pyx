# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The get and control calls of System V objects as plain functions: numbers in, tuples out. For the modules of this package.

Each raises the OSError of its number, without a name: who calls knows which object it was. None of them waits, so the
GIL is kept. Any thread.
"""
from libc.errno cimport EACCES, errno
from posix.types cimport gid_t, pid_t, time_t, uid_t

from anywire.ipc._system cimport fail

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <sys/ipc.h>
    #include <sys/msg.h>
    #include <sys/sem.h>
    #include <sys/shm.h>
    #ifndef MSG_STAT_ANY
    #define MSG_STAT_ANY 13                     /* Linux 4.17 */
    #endif

    /* semctl(2) lets the program define the union; its last argument is read as the command says. */
    union anywire_semun { int val; struct semid_ds* buf; unsigned short* array; };
    static int anywire_semctl_value(int id, int i, int command, int value) {
        union anywire_semun u = { .val = value };
        return semctl(id, i, command, u);
    }
    static int anywire_semctl_status(int id, int command, struct semid_ds* buf) {
        union anywire_semun u = { .buf = buf };
        return semctl(id, 0, command, u);
    }
    static int anywire_semctl_array(int id, int command, unsigned short* array) {
        union anywire_semun u = { .array = array };
        return semctl(id, 0, command, u);
    }
    """
    int MSG_STAT_ANY, IPC_STAT, IPC_SET, IPC_RMID, GETALL, SETALL, GETVAL, SETVAL, GETNCNT, GETZCNT, GETPID
    struct ipc_perm:
        int key "__key"
        uid_t uid
        gid_t gid
        uid_t cuid
        gid_t cgid
        unsigned short mode
    struct msqid_ds:
        ipc_perm msg_perm
        time_t msg_stime, msg_rtime, msg_ctime
        unsigned long msg_qnum, msg_qbytes
        unsigned long cbytes "__msg_cbytes"
        pid_t msg_lspid, msg_lrpid
    struct semid_ds:
        ipc_perm sem_perm
        time_t sem_otime, sem_ctime
        unsigned long sem_nsems
    struct shmid_ds:
        ipc_perm shm_perm
        size_t shm_segsz
        time_t shm_atime, shm_dtime, shm_ctime
        pid_t shm_cpid, shm_lpid
        unsigned long shm_nattch
    int c_ftok "ftok"(const char* path, int project)
    int c_msgget "msgget"(int key, int flags)
    int msgctl(int id, int command, msqid_ds* buf)
    int c_semget "semget"(int key, int count, int flags)
    int anywire_semctl_value(int id, int i, int command, int value)
    int anywire_semctl_status(int id, int command, semid_ds* buf)
    int anywire_semctl_array(int id, int command, unsigned short* array)
    int c_shmget "shmget"(int key, size_t size, int flags)
    int shmctl(int id, int command, shmid_ds* buf)

from cpython.mem cimport PyMem_Free, PyMem_Malloc

CONTROL_GETVAL = GETVAL
CONTROL_GETNCNT = GETNCNT
CONTROL_GETZCNT = GETZCNT
CONTROL_GETPID = GETPID


def project_key(bytes path, int project):
    cdef int key = c_ftok(path, project)
    if key == -1:
        fail(errno, path.decode("utf-8", "surrogateescape"), "ftok takes the key from an existing file")
    return key


cdef tuple _rights(ipc_perm* p):
    return (p.key, p.uid, p.gid, p.cuid, p.cgid, p.mode)


cdef int _set_rights(ipc_perm* p, object uid, object gid, object mode) except -1:
    if uid is not None:
        p.uid = uid
    if gid is not None:
        p.gid = gid
    if mode is not None:
        p.mode = <int> mode & 0o777
    return 0


def msgget(int key, int flags):
    cdef int found = c_msgget(key, flags)
    return found if found >= 0 else fail(errno, None)


def msg_status(int ident):
    """(key, uid, gid, cuid, cgid, mode), then in msqid_ds's order."""
    cdef msqid_ds d
    if msgctl(ident, IPC_STAT, &d) < 0:
        fail(errno, None)
    return _queue_status(&d)


def msg_status_any(int ident):
    """As msg_status, also for who may not read the queue."""
    cdef msqid_ds d
    cdef int bits
    if msgctl(ident, IPC_STAT, &d) < 0:
        if errno != EACCES:
            fail(errno, None)
        # MSG_STAT_ANY wants the place in the kernel's table: the low bits of the id, more of them with ipcmni_extend.
        for bits in (15, 24):
            if msgctl(ident & ((1 << bits) - 1), MSG_STAT_ANY, &d) == ident:
                break
        else:
            fail(EACCES, None)
    return _queue_status(&d)


cdef tuple _queue_status(msqid_ds* d):
    return (*_rights(&d.msg_perm), d.msg_qnum, d.cbytes, d.msg_qbytes, d.msg_lspid, d.msg_lrpid, d.msg_stime, d.msg_rtime,
            d.msg_ctime)


def msg_set(int ident, uid, gid, mode, max_bytes):
    cdef msqid_ds d
    if msgctl(ident, IPC_STAT, &d) < 0:
        fail(errno, None)
    _set_rights(&d.msg_perm, uid, gid, mode)
    if max_bytes is not None:
        d.msg_qbytes = max_bytes
    if msgctl(ident, IPC_SET, &d) < 0:
        fail(errno, None)


def msg_remove(int ident):
    if msgctl(ident, IPC_RMID, NULL) < 0:
        fail(errno, None)


def semget(int key, int count, int flags):
    cdef int found = c_semget(key, count, flags)
    return found if found >= 0 else fail(errno, None)


def sem_status(int ident):
    """(key, uid, gid, cuid, cgid, mode, number of semaphores, otime, ctime)"""
    cdef semid_ds d
    if anywire_semctl_status(ident, IPC_STAT, &d) < 0:
        fail(errno, None)
    return (*_rights(&d.sem_perm), d.sem_nsems, d.sem_otime, d.sem_ctime)


def sem_set(int ident, uid, gid, mode):
    cdef semid_ds d
    if anywire_semctl_status(ident, IPC_STAT, &d) < 0:
        fail(errno, None)
    _set_rights(&d.sem_perm, uid, gid, mode)
    if anywire_semctl_status(ident, IPC_SET, &d) < 0:
        fail(errno, None)


def sem_remove(int ident):
    if anywire_semctl_value(ident, 0, IPC_RMID, 0) < 0:
        fail(errno, None)


def sem_control(int ident, int i, int command):
    """One of CONTROL_..., of semaphore i."""
    cdef int found = anywire_semctl_value(ident, i, command, 0)
    return found if found >= 0 else fail(errno, None)


def sem_set_value(int ident, int i, int value):
    if anywire_semctl_value(ident, i, SETVAL, value) < 0:
        fail(errno, None)


def sem_values(int ident, int count):
    cdef unsigned short* array = <unsigned short*> PyMem_Malloc((count if count else 1) * sizeof(unsigned short))
    if array is NULL:
        raise MemoryError
    try:
        if anywire_semctl_array(ident, GETALL, array) < 0:
            fail(errno, None)
        return [array[i] for i in range(count)]
    finally:
        PyMem_Free(array)


def sem_set_values(int ident, list values):
    cdef Py_ssize_t i, count = len(values)
    cdef unsigned short* array = <unsigned short*> PyMem_Malloc((count if count else 1) * sizeof(unsigned short))
    if array is NULL:
        raise MemoryError
    try:
        for i in range(count):
            array[i] = values[i]
        if anywire_semctl_array(ident, SETALL, array) < 0:
            fail(errno, None)
    finally:
        PyMem_Free(array)


def shmget(int key, size_t size, int flags):
    cdef int found = c_shmget(key, size, flags)
    return found if found >= 0 else fail(errno, None)


def shm_status(int ident):
    """(key, uid, gid, cuid, cgid, mode), then in shmid_ds's order. The mode has SHM_DEST (01000) once it is removed."""
    cdef shmid_ds d
    if shmctl(ident, IPC_STAT, &d) < 0:
        fail(errno, None)
    return (*_rights(&d.shm_perm), d.shm_segsz, d.shm_atime, d.shm_dtime, d.shm_ctime, d.shm_cpid, d.shm_lpid, d.shm_nattch)


def shm_set(int ident, uid, gid, mode):
    cdef shmid_ds d
    if shmctl(ident, IPC_STAT, &d) < 0:
        fail(errno, None)
    _set_rights(&d.shm_perm, uid, gid, mode)
    if shmctl(ident, IPC_SET, &d) < 0:
        fail(errno, None)


def shm_remove(int ident):
    if shmctl(ident, IPC_RMID, NULL) < 0:
        fail(errno, None)
