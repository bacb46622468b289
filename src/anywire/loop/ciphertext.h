/* The memory on both sides of a TLS connection: ciphertext that came, and ciphertext that is to be sent.

   What comes is read in place where somebody else has put it (`window`), after what was kept of earlier (`kept`); what
   goes is written into one growing piece (`out`). No Python object is touched. One connection's, by one thread at a time. */
#ifndef ANYWIRE_CIPHERTEXT_H
#define ANYWIRE_CIPHERTEXT_H

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef struct bio_st aw_bio;
typedef struct ssl_st aw_ssl;

typedef struct {
    const char *window;                 /* ciphertext in place: the caller's, while it calls SSL_read */
    size_t window_size;
    char *kept;                         /* ciphertext of before, older than the window */
    size_t kept_start, kept_size, kept_capacity;
    char *out;                          /* what is to be sent */
    size_t out_size, out_capacity;
    size_t inside;                      /* bytes that libssl has of a record that is not complete: an estimate */
} aw_tls;

static inline int aw_tls_grow(char **room, size_t *capacity, size_t wanted)
{
    size_t more = *capacity + *capacity / 2, size = ((wanted > more ? wanted : more) + 1023) & ~(size_t) 1023;
    char *grown = realloc(*room, size);
    if (grown == NULL)
        return -1;
    *room = grown;
    *capacity = size;
    return 0;
}

/* Append to what is kept. 0, or -1 without memory. */
static inline int aw_tls_keep(aw_tls *t, const char *start, size_t size)
{
    if (t->kept_start && t->kept_start + t->kept_size + size > t->kept_capacity) {
        memmove(t->kept, t->kept + t->kept_start, t->kept_size);
        t->kept_start = 0;
    }
    if (t->kept_start + t->kept_size + size > t->kept_capacity
            && aw_tls_grow(&t->kept, &t->kept_capacity, t->kept_size + size) < 0)
        return -1;
    memcpy(t->kept + t->kept_start + t->kept_size, start, size);
    t->kept_size += size;
    return 0;
}

/* Room for `size` more bytes of output, so that writing doesn't grow it step by step. 0, or -1 without memory. */
static inline int aw_tls_reserve(aw_tls *t, size_t size)
{
    if (t->out_size + size <= t->out_capacity)
        return 0;
    return aw_tls_grow(&t->out, &t->out_capacity, t->out_size + size);
}

#endif
