"""The C library's heap, where large bytes objects live.

glibc gives the top of its heap back to the kernel as soon as 128 KiB of it are free, and takes blocks of 128 KiB and more
from the kernel one by one. A reader of large chunks frees and allocates such blocks all the time, and would pay for zeroed
pages with each: a tenth of the CPU time of an echo of 100 KiB chunks. Both limits follow what a program does: freeing a
block of n bytes that came from the kernel makes n the size from which blocks do, and 2 n what may stay free (mallopt(3),
M_MMAP_THRESHOLD). So `keep_heap` frees one of 4 MiB, which nobody ever touched: from then on at most 8 MiB stay. Limits
that the program or its environment has set are respected, and a C library without such limits just sees one malloc.

Called before the first large object, under the GIL. Nothing can go wrong: without memory nothing changes.
"""

cdef extern from *:
    """
    #include <stdlib.h>

    static inline void anywire_keep_heap(void)
    {
        static char done;
        if (!done) {
            void *volatile block;       /* volatile: or the compiler leaves both calls out */
            done = 1;
            block = malloc(4 << 20);
            free(block);
        }
    }
    """
    void keep_heap "anywire_keep_heap"() noexcept nogil
