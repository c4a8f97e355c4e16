/* Ciphers of disks: sectors of 512 bytes, each with an IV made of its number. OpenSSL's libcrypto does the work, or
 * libgcrypt. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "ring/extent.h"

#define CIPHER_SECTOR EXTENT_SECTOR

/* What the IV is, as dm-crypt names it; little-endian, filled up with zeros. */
enum cipher_iv {
    CIPHER_PLAIN,   /* the sector's number modulo 2^32 */
    CIPHER_PLAIN64, /* all of it */
    CIPHER_ESSIV,   /* all of it, encrypted with a second key */
};

struct cipher;

/* name: such as AES-256-XTS; essiv_name: of a cipher in ECB mode, or NULL. The keys are copied, and wiped at the end. One
 * thread. -> NULL: no library has the cipher with a key of this length, or no memory is left. */
struct cipher *cipher_create(const char *name, enum cipher_iv iv, const uint8_t *key, size_t key_nbytes,
                             const char *essiv_name, const uint8_t *essiv_key, size_t essiv_key_nbytes);
void cipher_destroy(struct cipher *cipher);

/* Sectors from number `sector` on, whole ones; `to` is `from` or does not overlap it. -> 0, or -EIO. */
int cipher_encrypt(struct cipher *cipher, uint64_t sector, const uint8_t *from, uint8_t *to, size_t nbytes);
int cipher_decrypt(struct cipher *cipher, uint64_t sector, const uint8_t *from, uint8_t *to, size_t nbytes);

/* What a device takes: the cipher, which must outlive it, for a file whose sector 0 is at `origin`. */
void cipher_export(struct cipher *cipher, uint64_t origin, struct extent_cipher *out);

/* From now on this process leaves no core dump, and nobody but root may look into it. -> 0 or -errno */
int secrets_stay_in_memory(void);
