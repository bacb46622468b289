# An open message queue that tells of messages: see _mqueue_notify.pyx.
from anywire.ipc._mqueue_open cimport OpenQueue


cdef class NotifyingQueue(OpenQueue):
    pass
