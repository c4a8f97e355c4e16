#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include <openssl/core_names.h>
#include <openssl/evp.h>

#include "qcow2/plane/cipher.h"
#include "qcow2/plane/gcrypt.h"

#define IV_NBYTES 16

/* A context: its key is set once, its IV for each sector; it is wiped when freed. */
struct direction {
    EVP_CIPHER_CTX *context;
    uint8_t *iv; /* the context's own; NULL: to store one there is not enough */
};

struct cipher {
    struct direction encryption;
    struct direction decryption;
    EVP_CIPHER_CTX *essiv; /* NULL: the IV is the number */
    struct gcrypt *other, *other_essiv; /* in place of all that, for what libcrypto does not have */
    enum cipher_iv iv;
};

/* The others never do, and to say so costs a tenth of each sector: libcrypto says it again with each IV. */
static int pads(const EVP_CIPHER *kind)
{
    return EVP_CIPHER_get_mode(kind) == EVP_CIPH_CBC_MODE || EVP_CIPHER_get_mode(kind) == EVP_CIPH_ECB_MODE;
}

/* One direction of the cipher with its key. -> NULL: there is no such cipher, or no memory. */
static EVP_CIPHER_CTX *with_key(const char *name, const uint8_t *key, size_t key_nbytes, int encrypts)
{
    static const uint8_t no_iv[IV_NBYTES];
    EVP_CIPHER *kind = EVP_CIPHER_fetch(NULL, name, NULL);
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();

    if (!kind || !context || (size_t)EVP_CIPHER_get_key_length(kind) != key_nbytes ||
        EVP_CIPHER_get_iv_length(kind) > IV_NBYTES ||
        EVP_CipherInit_ex2(context, kind, key, no_iv, encrypts, NULL) != 1 ||
        (pads(kind) && EVP_CIPHER_CTX_set_padding(context, 0) != 1)) {
        EVP_CIPHER_CTX_free(context);
        context = NULL;
    }
    EVP_CIPHER_free(kind);
    return context;
}

static int update_sector(EVP_CIPHER_CTX *context, const uint8_t *from, uint8_t *to)
{
    int done;

    return EVP_CipherUpdate(context, to, &done, from, CIPHER_SECTOR) == 1 && done == CIPHER_SECTOR ? 0 : -EIO;
}

/* Where the context keeps its IV, if one that is stored there does what one given with an init does: the init of a sector
 * costs libcrypto more than half of what the sector does. */
static uint8_t *find_iv(EVP_CIPHER_CTX *context)
{
    static const uint8_t zeros[CIPHER_SECTOR], first[IV_NBYTES] = {1, 2, 3}, second[IV_NBYTES] = {4, 5, 6};
    uint8_t given[CIPHER_SECTOR], other[CIPHER_SECTOR], stored[CIPHER_SECTOR];
    void *iv = NULL;
    OSSL_PARAM parameters[] = {
        OSSL_PARAM_construct_octet_ptr(OSSL_CIPHER_PARAM_UPDATED_IV, &iv, IV_NBYTES),
        OSSL_PARAM_construct_end(),
    };

    if (EVP_CIPHER_CTX_get_iv_length(context) != IV_NBYTES || EVP_CIPHER_CTX_get_params(context, parameters) != 1 || !iv ||
        EVP_CipherInit_ex2(context, NULL, NULL, first, -1, NULL) != 1 || update_sector(context, zeros, given) < 0)
        return NULL;
    memcpy(iv, second, IV_NBYTES);
    if (update_sector(context, zeros, other) < 0)
        return NULL;
    memcpy(iv, first, IV_NBYTES);
    if (update_sector(context, zeros, stored) < 0 || memcmp(given, stored, CIPHER_SECTOR) != 0)
        return NULL;
    return memcmp(given, other, CIPHER_SECTOR) == 0 ? NULL : iv;
}

static struct direction direction_create(const char *name, const uint8_t *key, size_t key_nbytes, int encrypts)
{
    struct direction direction = {with_key(name, key, key_nbytes, encrypts), NULL};

    if (direction.context)
        direction.iv = find_iv(direction.context);
    return direction;
}

struct cipher *cipher_create(const char *name, enum cipher_iv iv, const uint8_t *key, size_t key_nbytes,
                             const char *essiv_name, const uint8_t *essiv_key, size_t essiv_key_nbytes)
{
    struct cipher *cipher = calloc(1, sizeof(*cipher));

    if (!cipher)
        return NULL;
    cipher->iv = iv;
    cipher->other = gcrypt_create(name, key, key_nbytes);
    if (cipher->other && iv == CIPHER_ESSIV)
        cipher->other_essiv = gcrypt_create(essiv_name, essiv_key, essiv_key_nbytes);
    if (cipher->other && (iv != CIPHER_ESSIV || cipher->other_essiv))
        return cipher;
    cipher->encryption = direction_create(name, key, key_nbytes, 1);
    cipher->decryption = direction_create(name, key, key_nbytes, 0);
    if (essiv_name)
        cipher->essiv = with_key(essiv_name, essiv_key, essiv_key_nbytes, 1);
    if (cipher->encryption.context && cipher->decryption.context && (iv != CIPHER_ESSIV || cipher->essiv))
        return cipher;
    cipher_destroy(cipher);
    return NULL;
}

void cipher_destroy(struct cipher *cipher)
{
    if (!cipher)
        return;
    EVP_CIPHER_CTX_free(cipher->encryption.context);
    EVP_CIPHER_CTX_free(cipher->decryption.context);
    EVP_CIPHER_CTX_free(cipher->essiv);
    gcrypt_destroy(cipher->other);
    gcrypt_destroy(cipher->other_essiv);
    free(cipher);
}

static void number_iv(const struct cipher *cipher, uint64_t sector, uint8_t iv[IV_NBYTES])
{
    uint64_t number = htole64(cipher->iv == CIPHER_PLAIN ? (uint32_t)sector : sector);

    memset(iv, 0, IV_NBYTES);
    memcpy(iv, &number, sizeof(number));
}

static int set_iv(struct cipher *cipher, const struct direction *direction, uint64_t sector)
{
    uint8_t iv[IV_NBYTES];
    int nbytes;

    number_iv(cipher, sector, iv);
    if (cipher->iv == CIPHER_ESSIV && EVP_CipherUpdate(cipher->essiv, iv, &nbytes, iv, sizeof(iv)) != 1)
        return -EIO;
    if (!direction->iv)
        return EVP_CipherInit_ex2(direction->context, NULL, NULL, iv, -1, NULL) == 1 ? 0 : -EIO;
    memcpy(direction->iv, iv, sizeof(iv));
    return 0;
}

static int convert(struct cipher *cipher, const struct direction *direction, uint64_t sector, const uint8_t *from,
                   uint8_t *to, size_t nbytes)
{
    if (nbytes % CIPHER_SECTOR)
        return -EIO;
    for (; nbytes; from += CIPHER_SECTOR, to += CIPHER_SECTOR, nbytes -= CIPHER_SECTOR)
        if (set_iv(cipher, direction, sector++) < 0 || update_sector(direction->context, from, to) < 0)
            return -EIO;
    return 0;
}

static int set_other_iv(struct cipher *cipher, uint64_t sector)
{
    uint8_t iv[IV_NBYTES];

    number_iv(cipher, sector, iv);
    if (cipher->other_essiv && gcrypt_encrypt(cipher->other_essiv, iv, iv, gcrypt_block_nbytes(cipher->other_essiv)) < 0)
        return -EIO;
    return gcrypt_set_iv(cipher->other, iv);
}

static int convert_by_other(struct cipher *cipher, gcrypt_step step, uint64_t sector, const uint8_t *from, uint8_t *to,
                            size_t nbytes)
{
    if (nbytes % CIPHER_SECTOR)
        return -EIO;
    for (; nbytes; from += CIPHER_SECTOR, to += CIPHER_SECTOR, nbytes -= CIPHER_SECTOR)
        if (set_other_iv(cipher, sector++) < 0 || step(cipher->other, from, to, CIPHER_SECTOR) < 0)
            return -EIO;
    return 0;
}

int cipher_encrypt(struct cipher *cipher, uint64_t sector, const uint8_t *from, uint8_t *to, size_t nbytes)
{
    if (cipher->other)
        return convert_by_other(cipher, gcrypt_encrypt, sector, from, to, nbytes);
    return convert(cipher, &cipher->encryption, sector, from, to, nbytes);
}

int cipher_decrypt(struct cipher *cipher, uint64_t sector, const uint8_t *from, uint8_t *to, size_t nbytes)
{
    if (cipher->other)
        return convert_by_other(cipher, gcrypt_decrypt, sector, from, to, nbytes);
    return convert(cipher, &cipher->decryption, sector, from, to, nbytes);
}

static int export_encrypt(void *context, uint64_t sector, const uint8_t *from, uint8_t *to, size_t nbytes)
{
    return cipher_encrypt(context, sector, from, to, nbytes);
}

static int export_decrypt(void *context, uint64_t sector, const uint8_t *from, uint8_t *to, size_t nbytes)
{
    return cipher_decrypt(context, sector, from, to, nbytes);
}

void cipher_export(struct cipher *cipher, uint64_t origin, struct extent_cipher *out)
{
    *out = (struct extent_cipher){export_encrypt, export_decrypt, cipher, origin};
}

int secrets_stay_in_memory(void)
{
    return prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 ? -errno : 0;
}
