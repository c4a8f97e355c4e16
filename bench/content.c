#include "bench/content.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SECTOR 512

struct stamp {
    uint64_t guest_offset;
    uint64_t seed;
    uint32_t generation;
    uint32_t check; /* makes a torn or foreign stamp improbable */
};

static struct content_block *block_at(const struct content *content, uint64_t guest_offset)
{
    return &content->blocks[(guest_offset - content->start) / content->block_size];
}

static struct stamp stamp_of(const struct content *content, uint64_t guest_offset, uint32_t generation)
{
    uint64_t mixed = (guest_offset ^ content->seed) * 0x9e3779b97f4a7c15ull + generation;

    return (struct stamp){guest_offset, content->seed, generation, (uint32_t)(mixed >> 32)};
}

int content_init(struct content *content, uint64_t start, uint64_t nbytes, uint32_t block_size, uint64_t seed)
{
    *content = (struct content){.start = start, .count = nbytes / block_size, .block_size = block_size, .seed = seed};
    content->blocks = calloc(content->count, sizeof(*content->blocks));
    return content->blocks ? 0 : -ENOMEM;
}

void content_deinit(struct content *content)
{
    free(content->blocks);
    content->blocks = NULL;
}

bool content_is_busy(const struct content *content, uint64_t guest_offset)
{
    const struct content_block *block = block_at(content, guest_offset);

    return block->written != block->issued;
}

void content_issue(struct content *content, uint64_t guest_offset, uint8_t *data)
{
    uint32_t generation = ++block_at(content, guest_offset)->issued;

    for (uint32_t at = 0; at < content->block_size; at += SECTOR) {
        struct stamp stamp = stamp_of(content, guest_offset + at, generation);
        for (uint32_t i = 0; i < SECTOR; i += 32)
            memcpy(data + at + i, &stamp, sizeof(stamp));
    }
}

void content_acknowledge(struct content *content, uint64_t guest_offset)
{
    struct content_block *block = block_at(content, guest_offset);

    block->written = block->issued;
}

uint32_t content_oldest(const struct content *content, uint64_t guest_offset)
{
    return block_at(content, guest_offset)->written;
}

static bool holds(const uint8_t *sector, const struct stamp *stamp)
{
    for (uint32_t i = 0; i < SECTOR; i += 32)
        if (memcmp(sector + i, stamp, sizeof(*stamp)) != 0)
            return false;
    return true;
}

bool content_is_right(const struct content *content, uint64_t guest_offset, uint32_t oldest, const uint8_t *data)
{
    uint32_t newest = block_at(content, guest_offset)->issued;

    if (oldest == 0)
        return true; /* what was there before may be anything */
    for (uint32_t at = 0; at < content->block_size; at += SECTOR) {
        struct stamp found, stamp;
        memcpy(&found, data + at, sizeof(found));
        if (found.generation < oldest || found.generation > newest)
            return false;
        /* Sectors may differ: a write in flight is not atomic. */
        stamp = stamp_of(content, guest_offset + at, found.generation);
        if (!holds(data + at, &stamp))
            return false;
    }
    return true;
}
