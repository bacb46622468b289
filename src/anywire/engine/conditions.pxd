# The numbers of conditions.py, as C constants. READ and WRITE are those of anywire.contract.endpoint, too.

cdef enum:
    READ = 1
    WRITE = 2
    PRIORITY = 4
    HANGUP = 8
    READ_HANGUP = 16
    ERROR = 32
    ALL_CONDITIONS = 63

cdef enum:
    LEVEL = 0
    EDGE = 1
    ONESHOT = 2
    EXCLUSIVE = 4
