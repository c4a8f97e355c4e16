/* Block ciphers that libcrypto does not have: libgcrypt's, which is loaded when the first disk needs one. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define GCRYPT_IV_NBYTES 16 /* the longest one */

struct gcrypt;

/* name: such as SERPENT-256-XTS. The key is copied, and wiped at the end. -> NULL: there is no such library, nor such a
 * cipher with a key of this length, or no memory is left. */
struct gcrypt *gcrypt_create(const char *name, const uint8_t *key, size_t key_nbytes);
void gcrypt_destroy(struct gcrypt *gcrypt);

/* Begin again with as many bytes of the IV as the cipher wants. -> 0 or -EIO */
int gcrypt_set_iv(struct gcrypt *gcrypt, const uint8_t iv[GCRYPT_IV_NBYTES]);

/* Whole sectors, or of a cipher without an IV whole blocks; `to` is `from` or does not overlap it. -> 0 or -EIO */
typedef int (*gcrypt_step)(struct gcrypt *gcrypt, const uint8_t *from, uint8_t *to, size_t nbytes);
int gcrypt_encrypt(struct gcrypt *gcrypt, const uint8_t *from, uint8_t *to, size_t nbytes);
int gcrypt_decrypt(struct gcrypt *gcrypt, const uint8_t *from, uint8_t *to, size_t nbytes);

/* Of the cipher. */
size_t gcrypt_block_nbytes(const struct gcrypt *gcrypt);
