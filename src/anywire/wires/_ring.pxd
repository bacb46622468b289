# The ring of shared memory (ipc/ring.h, ipc/ring_looks.h), for the modules that use it.
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "anywire/ipc/ring.h" nogil:
    enum:
        AW_RECORD, AW_RETURNS, AW_RING_VERSION
    uint64_t AW_RING_MAGIC
    ctypedef struct aw_control:
        uint64_t magic
        uint32_t version
        uint64_t nonce
    ctypedef struct aw_producer:
        char* data
        aw_control* control
        uint64_t size, head, published, tail_seen, returned_seen
    ctypedef struct aw_consumer:
        const char* data
        aw_control* control
        uint64_t size, tail, head_seen, looked, taken, returned
    ctypedef struct aw_record:
        uint32_t kind, length
        const char* data
    uint64_t aw_space(uint64_t length)
    int aw_see_tail(aw_producer* p)
    int aw_has_room(aw_producer* p, uint64_t length)
    char* aw_slot(aw_producer* p)
    void aw_commit(aw_producer* p, uint32_t kind, uint32_t length)
    void aw_publish(aw_producer* p)
    int aw_must_ring(aw_producer* p)
    void aw_awake_with_room(aw_producer* p)
    int aw_next_return(aw_producer* p, uint32_t* unit)
    int aw_has_data(aw_consumer* c)
    int aw_peek(aw_consumer* c, aw_record* record)
    void aw_advance(aw_consumer* c, uint32_t length)
    void aw_release_records(aw_consumer* c)
    void aw_count_taken(aw_consumer* c, uint64_t count)
    int aw_room_was_wanted(aw_consumer* c, int now)
    int aw_sleep_for_data(aw_consumer* c)
    void aw_awake_with_data(aw_consumer* c)
    void aw_return(aw_consumer* c, uint32_t unit)

cdef extern from "anywire/ipc/ring_looks.h" nogil:
    uint64_t aw_taken(aw_control* c)
    uint64_t aw_echo(aw_control* c)
    void aw_set_echo(aw_control* c, uint64_t v)
    int aw_closed(aw_control* c)
    void aw_set_closed(aw_control* c)
    int aw_data_wanted(aw_control* c)
    int aw_room_wanted(aw_control* c)
    uint64_t AW_AN_EXTENT
    int aw_can_send(aw_producer* p, uint64_t need)
    int aw_sleep_to_send(aw_producer* p, uint64_t need)
    uint64_t aw_now()
    uint64_t aw_tick()
    int aw_spin(aw_consumer* c, aw_producer* p, uint64_t need, uint64_t ns)
    int aw_glance(aw_consumer* c, aw_producer* p, uint64_t need)
