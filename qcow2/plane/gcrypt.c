#include "qcow2/plane/gcrypt.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* What its manual calls them; the numbers are its ABI, as is the name of the library since 2011. */
enum { CAST5 = 3, TWOFISH = 10, TWOFISH128 = 303, SERPENT128, SERPENT192, SERPENT256 };
enum { ECB = 1, CBC = 3, CTR = 6, XTS = 13 };
enum { DISABLE_SECMEM = 37, INITIALIZATION_FINISHED = 38, IS_INITIALIZED = 39 };

static struct {
    void *handle; /* NULL: there is none */
    const char *(*check_version)(const char *wanted);
    uint32_t (*control)(int command, ...);
    uint32_t (*open)(void **context, int algorithm, int mode, unsigned flags);
    void (*close)(void *context);
    uint32_t (*setkey)(void *context, const void *key, size_t nbytes);
    uint32_t (*setiv)(void *context, const void *iv, size_t nbytes);
    uint32_t (*setctr)(void *context, const void *counter, size_t nbytes);
    uint32_t (*encrypt)(void *context, void *to, size_t to_nbytes, const void *from, size_t from_nbytes);
    uint32_t (*decrypt)(void *context, void *to, size_t to_nbytes, const void *from, size_t from_nbytes);
} library;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static const struct kind {
    const char *name;
    int algorithm, mode;
    uint8_t key_nbytes, block_nbytes;
} kinds[] = {
#define KINDS_OF(name, algorithm, key_nbytes, block_nbytes)                                                            \
    {name "-ECB", algorithm, ECB, key_nbytes, block_nbytes}, {name "-CBC", algorithm, CBC, key_nbytes, block_nbytes},  \
        {name "-CTR", algorithm, CTR, key_nbytes, block_nbytes}
    KINDS_OF("SERPENT-128", SERPENT128, 16, 16),
    KINDS_OF("SERPENT-192", SERPENT192, 24, 16),
    KINDS_OF("SERPENT-256", SERPENT256, 32, 16),
    KINDS_OF("TWOFISH-128", TWOFISH128, 16, 16),
    KINDS_OF("TWOFISH-256", TWOFISH, 32, 16),
    KINDS_OF("CAST5-128", CAST5, 16, 8),
    {"SERPENT-128-XTS", SERPENT128, XTS, 32, 16},
    {"SERPENT-192-XTS", SERPENT192, XTS, 48, 16},
    {"SERPENT-256-XTS", SERPENT256, XTS, 64, 16},
    {"TWOFISH-128-XTS", TWOFISH128, XTS, 32, 16},
    {"TWOFISH-256-XTS", TWOFISH, XTS, 64, 16},
};

struct gcrypt {
    const struct kind *kind;
    void *context;
};

static int find(const char *name, void *function)
{
    void *symbol = dlsym(library.handle, name);

    memcpy(function, &symbol, sizeof(symbol)); /* C has no conversion between the two */
    return symbol != NULL;
}

static void load(void)
{
    library.handle = dlopen("libgcrypt.so.20", RTLD_NOW | RTLD_LOCAL);
    if (!library.handle)
        return;
    if (!find("gcry_check_version", &library.check_version) || !find("gcry_control", &library.control) ||
        !find("gcry_cipher_open", &library.open) || !find("gcry_cipher_close", &library.close) ||
        !find("gcry_cipher_setkey", &library.setkey) || !find("gcry_cipher_setiv", &library.setiv) ||
        !find("gcry_cipher_setctr", &library.setctr) || !find("gcry_cipher_encrypt", &library.encrypt) ||
        !find("gcry_cipher_decrypt", &library.decrypt) || !library.check_version("1.8.0")) { /* XTS */
        library.handle = NULL;
        return;
    }
    if (!library.control(IS_INITIALIZED)) { /* a program may have done that */
        library.control(DISABLE_SECMEM, 0);
        library.control(INITIALIZATION_FINISHED, 0);
    }
}

static const struct kind *kind_of(const char *name, size_t key_nbytes)
{
    for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++)
        if (!strcmp(kinds[i].name, name) && kinds[i].key_nbytes == key_nbytes)
            return &kinds[i];
    return NULL;
}

struct gcrypt *gcrypt_create(const char *name, const uint8_t *key, size_t key_nbytes)
{
    const struct kind *kind = kind_of(name, key_nbytes);
    struct gcrypt *gcrypt;

    if (!kind || pthread_once(&once, load) || !library.handle)
        return NULL;
    gcrypt = calloc(1, sizeof(*gcrypt));
    if (!gcrypt)
        return NULL;
    gcrypt->kind = kind;
    if (!library.open(&gcrypt->context, kind->algorithm, kind->mode, 0) &&
        !library.setkey(gcrypt->context, key, key_nbytes))
        return gcrypt;
    gcrypt_destroy(gcrypt);
    return NULL;
}

void gcrypt_destroy(struct gcrypt *gcrypt)
{
    if (!gcrypt)
        return;
    if (gcrypt->context)
        library.close(gcrypt->context);
    free(gcrypt);
}

int gcrypt_set_iv(struct gcrypt *gcrypt, const uint8_t iv[GCRYPT_IV_NBYTES])
{
    uint32_t error = 0;

    if (gcrypt->kind->mode == CTR)
        error = library.setctr(gcrypt->context, iv, gcrypt->kind->block_nbytes);
    else if (gcrypt->kind->mode != ECB)
        error = library.setiv(gcrypt->context, iv, gcrypt->kind->block_nbytes);
    return error ? -EIO : 0;
}

int gcrypt_encrypt(struct gcrypt *gcrypt, const uint8_t *from, uint8_t *to, size_t nbytes)
{
    return library.encrypt(gcrypt->context, to, nbytes, from, nbytes) ? -EIO : 0;
}

int gcrypt_decrypt(struct gcrypt *gcrypt, const uint8_t *from, uint8_t *to, size_t nbytes)
{
    return library.decrypt(gcrypt->context, to, nbytes, from, nbytes) ? -EIO : 0;
}

size_t gcrypt_block_nbytes(const struct gcrypt *gcrypt)
{
    return gcrypt->kind->block_nbytes;
}
