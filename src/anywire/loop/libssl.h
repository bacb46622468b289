/* The OpenSSL that Python's own `_ssl` module uses, found at run time; and a BIO whose two ends lie open.

   No header of OpenSSL is needed and nothing is linked: what is called here is declared here, by the manual of OpenSSL
   1.1.1 to 3 (the declarations are the same in all of them). `aw_libssl_load` looks the functions up in the object that
   was loaded for `_ssl`, so they are those of the libssl that made the `SSL` objects; another of the same name in the
   process, or another version number than Python knows, is refused.

   The BIO (BIO_meth_new(3)) reads from and writes into an `aw_tls` (ciphertext.h). It touches no Python object: `_ssl`
   calls it without the GIL in handshakes. It belongs to one connection, and whoever uses that has it to himself. */
#ifndef ANYWIRE_LIBSSL_H
#define ANYWIRE_LIBSSL_H

#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "anywire/loop/ciphertext.h"

static struct {
    unsigned long (*OpenSSL_version_num)(void);
    int (*SSL_read_ex)(aw_ssl *, void *, size_t, size_t *);
    int (*SSL_write_ex)(aw_ssl *, const void *, size_t, size_t *);
    int (*SSL_get_error)(const aw_ssl *, int);
    int (*SSL_pending)(const aw_ssl *);
    int (*SSL_get_shutdown)(const aw_ssl *);
    void (*SSL_set_bio)(aw_ssl *, aw_bio *, aw_bio *);
    void *(*SSL_get_ex_data)(const aw_ssl *, int);
    void *(*BIO_meth_new)(int, const char *);
    int (*BIO_meth_set_read)(void *, int (*)(aw_bio *, char *, int));
    int (*BIO_meth_set_write)(void *, int (*)(aw_bio *, const char *, int));
    int (*BIO_meth_set_ctrl)(void *, long (*)(aw_bio *, int, long, void *));
    int (*BIO_meth_set_destroy)(void *, int (*)(aw_bio *));
    aw_bio *(*BIO_new)(const void *);
    int (*BIO_free)(aw_bio *);
    int (*BIO_up_ref)(aw_bio *);
    void (*BIO_set_data)(aw_bio *, void *);
    void *(*BIO_get_data)(aw_bio *);
    void (*BIO_set_init)(aw_bio *, int);
    void (*BIO_set_flags)(aw_bio *, int);
    void (*BIO_clear_flags)(aw_bio *, int);
    int (*BIO_get_new_index)(void);
    unsigned long (*ERR_peek_error)(void);
    void (*ERR_clear_error)(void);
    void *method;                       /* our BIO_METHOD; it lives as long as the process */
} aw_libssl;

/* SSL_get_error(3), SSL_get_shutdown(3), BIO_set_flags(3), BIO_ctrl(3), BIO_meth_new(3) */
enum {
    AW_SSL_ERROR_SSL = 1, AW_SSL_ERROR_WANT_READ = 2, AW_SSL_ERROR_WANT_WRITE = 3, AW_SSL_ERROR_SYSCALL = 5,
    AW_SSL_ERROR_ZERO_RETURN = 6,
    AW_SSL_RECEIVED_SHUTDOWN = 2,
    AW_BIO_FLAGS_RETRY = 0x0f,          /* READ, WRITE, IO_SPECIAL, SHOULD_RETRY */
    AW_BIO_FLAGS_RETRY_READ = 0x09,     /* READ, SHOULD_RETRY */
    AW_BIO_CTRL_PENDING = 10, AW_BIO_CTRL_FLUSH = 11, AW_BIO_CTRL_WPENDING = 13,
    AW_BIO_TYPE_SOURCE_SINK = 0x0400
};

static int aw_bio_read(aw_bio *bio, char *into, int asked)
{
    aw_tls *t = aw_libssl.BIO_get_data(bio);
    size_t wanted = asked > 0 ? (size_t) asked : 0, got = 0, n;
    aw_libssl.BIO_clear_flags(bio, AW_BIO_FLAGS_RETRY);
    if (t->kept_size) {
        got = wanted < t->kept_size ? wanted : t->kept_size;
        memcpy(into, t->kept + t->kept_start, got);
        t->kept_start += got;
        t->kept_size -= got;
        if (t->kept_size == 0) {        /* an idle connection keeps no room */
            free(t->kept);
            t->kept = NULL;
            t->kept_start = t->kept_capacity = 0;
        }
    }
    if (got < wanted && t->window_size) {
        n = wanted - got < t->window_size ? wanted - got : t->window_size;
        memcpy(into + got, t->window, n);
        t->window += n;
        t->window_size -= n;
        got += n;
    }
    /* libssl asks for a header of 5 bytes, and then for exactly the rest of the record. */
    t->inside = got == wanted && wanted != 5 ? 0 : t->inside + got;
    if (got)
        return (int) got;
    if (wanted)
        aw_libssl.BIO_set_flags(bio, AW_BIO_FLAGS_RETRY_READ);
    return wanted ? -1 : 0;
}

static int aw_bio_write(aw_bio *bio, const char *start, int size)
{
    aw_tls *t = aw_libssl.BIO_get_data(bio);
    aw_libssl.BIO_clear_flags(bio, AW_BIO_FLAGS_RETRY);
    if (size <= 0)
        return 0;
    if (aw_tls_reserve(t, (size_t) size) < 0)
        return -1;                      /* errno is ENOMEM, and Python says so */
    memcpy(t->out + t->out_size, start, (size_t) size);
    t->out_size += (size_t) size;
    return size;
}

static long aw_bio_ctrl(aw_bio *bio, int command, long number, void *pointer)
{
    aw_tls *t = aw_libssl.BIO_get_data(bio);
    (void) number;
    (void) pointer;
    switch (command) {
    case AW_BIO_CTRL_FLUSH:
        return 1;
    case AW_BIO_CTRL_PENDING:
        return (long) (t->kept_size + t->window_size);
    case AW_BIO_CTRL_WPENDING:
        return (long) t->out_size;
    default:
        return 0;
    }
}

static int aw_bio_destroy(aw_bio *bio)
{
    aw_tls *t = aw_libssl.BIO_get_data(bio);
    if (t != NULL) {
        free(t->kept);
        free(t->out);
        free(t);
        aw_libssl.BIO_set_data(bio, NULL);
    }
    return 1;
}

/* A new BIO with its `*t`, or NULL. */
static aw_bio *aw_bio_new(aw_tls **t)
{
    aw_bio *bio;
    *t = calloc(1, sizeof **t);
    if (*t == NULL)
        return NULL;
    bio = aw_libssl.BIO_new(aw_libssl.method);
    if (bio == NULL) {
        free(*t);
        return NULL;
    }
    aw_libssl.BIO_set_data(bio, *t);
    aw_libssl.BIO_set_init(bio, 1);
    return bio;
}

/* Look all functions up. NULL: they are there. Else what is wrong, for people. `path` is that of the extension module
   `_ssl`, which is loaded; `version` is what Python says is OpenSSL's number. */
static const char *aw_libssl_load(const char *path, unsigned long version)
{
    static const struct { const char *name; void *place; } functions[] = {
#define AW_FUNCTION(name) {#name, &aw_libssl.name}
        AW_FUNCTION(OpenSSL_version_num), AW_FUNCTION(SSL_read_ex), AW_FUNCTION(SSL_write_ex),
        AW_FUNCTION(SSL_get_error), AW_FUNCTION(SSL_pending), AW_FUNCTION(SSL_get_shutdown), AW_FUNCTION(SSL_set_bio),
        AW_FUNCTION(SSL_get_ex_data), AW_FUNCTION(BIO_meth_new), AW_FUNCTION(BIO_meth_set_read),
        AW_FUNCTION(BIO_meth_set_write), AW_FUNCTION(BIO_meth_set_ctrl), AW_FUNCTION(BIO_meth_set_destroy),
        AW_FUNCTION(BIO_new), AW_FUNCTION(BIO_free), AW_FUNCTION(BIO_up_ref), AW_FUNCTION(BIO_set_data),
        AW_FUNCTION(BIO_get_data), AW_FUNCTION(BIO_set_init), AW_FUNCTION(BIO_set_flags), AW_FUNCTION(BIO_clear_flags),
        AW_FUNCTION(BIO_get_new_index), AW_FUNCTION(ERR_peek_error), AW_FUNCTION(ERR_clear_error),
#undef AW_FUNCTION
    };
    void *handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD), *found, *global;
    size_t i;
    int index;
    if (handle == NULL)
        return "the extension module _ssl is not loaded from its file";
    for (i = 0; i < sizeof functions / sizeof *functions; i++) {
        found = dlsym(handle, functions[i].name);
        if (found == NULL)
            return functions[i].name;
        /* _ssl itself was bound to one that all see, if there is such a one: then it must be the same. */
        global = dlsym(RTLD_DEFAULT, functions[i].name);
        if (global != NULL && global != found)
            return "two libraries have functions of OpenSSL's names";
        memcpy(functions[i].place, &found, sizeof found);
    }
    /* The handle stays open: so long as functions of it may be called. */
    if (aw_libssl.OpenSSL_version_num() != version)
        return "the OpenSSL that was found is not the one that Python knows";
    index = aw_libssl.BIO_get_new_index();
    if (index < 0)
        return "BIO_get_new_index";
    aw_libssl.method = aw_libssl.BIO_meth_new(index | AW_BIO_TYPE_SOURCE_SINK, "anywire");
    if (aw_libssl.method == NULL || !aw_libssl.BIO_meth_set_read(aw_libssl.method, aw_bio_read)
            || !aw_libssl.BIO_meth_set_write(aw_libssl.method, aw_bio_write)
            || !aw_libssl.BIO_meth_set_ctrl(aw_libssl.method, aw_bio_ctrl)
            || !aw_libssl.BIO_meth_set_destroy(aw_libssl.method, aw_bio_destroy))
        return "BIO_meth_new";
    return NULL;
}

#endif
