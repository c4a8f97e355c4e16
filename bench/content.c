#include "bench/content.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define STRIDE 32 /* bytes from one stamp to the next */

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

    for (uint32_t at = 0; at < content->block_size; at += STRIDE) {
        struct stamp stamp = stamp_of(content, guest_offset + at, generation);
        memcpy(data + at, &stamp, sizeof(stamp));
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

bool content_is_right(const struct content *content, uint64_t guest_offset, uint32_t oldest, const uint8_t *data)
{
    uint32_t newest = block_at(content, guest_offset)->issued;

    if (oldest == 0)
        return true; /* what was there before may be anything */
    for (uint32_t at = 0; at < content->block_size; at += STRIDE) {
        struct stamp found, stamp;
        memcpy(&found, data + at, sizeof(found));
        /* Generations may alternate within a sector: a buffered read on ext4 takes no lock against a write in flight. */
        if (found.generation < oldest || found.generation > newest)
            return false;
        stamp = stamp_of(content, guest_offset + at, found.generation);
        if (memcmp(&found, &stamp, sizeof(stamp)) != 0)
            return false;
    }
    return true;
}
