/* Data that says where it belongs and which write put it there, and a record of what each block may hold.
 *
 * A block has at most one write in flight, so after it the block holds one
 * generation and no other; generation 0 is what was there before the load.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct content_block {
    uint32_t written; /* generation of the last write that was acknowledged */
    uint32_t issued;  /* of the last one submitted; the two differ while it is in flight */
};

struct content {
    uint64_t start; /* guest offset of the first block */
    uint64_t count;
    uint32_t block_size; /* a multiple of 512 */
    uint64_t seed;
    struct content_block *blocks;
};

/* -ENOMEM */
int content_init(struct content *content, uint64_t start, uint64_t nbytes, uint32_t block_size, uint64_t seed);
void content_deinit(struct content *content);

/* True while another write to the block is in flight: write elsewhere. */
bool content_is_busy(const struct content *content, uint64_t guest_offset);

/* Start a write: fill `data` with the block's next generation. */
void content_issue(struct content *content, uint64_t guest_offset, uint8_t *data);

/* The write was acknowledged. */
void content_acknowledge(struct content *content, uint64_t guest_offset);

/* The generation a read that starts now must see at least. */
uint32_t content_oldest(const struct content *content, uint64_t guest_offset);

/* Does `data` hold this block, every part of it no older than `oldest`? Only a
 * write in flight lets parts differ. Zero or foreign bytes are right only where
 * nothing was acknowledged before. */
bool content_is_right(const struct content *content, uint64_t guest_offset, uint32_t oldest, const uint8_t *data);
