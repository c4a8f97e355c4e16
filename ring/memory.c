#include "ring/memory.h"

#include <errno.h>
#include <linux/magic.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "ring/loss.h"

static bool wraps(uint64_t start, uint64_t nbytes)
{
    uint64_t end;
    return __builtin_add_overflow(start, nbytes, &end);
}

static bool overlaps(uint64_t a, uint64_t a_nbytes, uint64_t b, uint64_t b_nbytes)
{
    return a < b + b_nbytes && b < a + a_nbytes;
}

/* What mappings of the file are aligned to: hugetlbfs alone gives its page as the block size. */
static uint64_t page_size(int fd)
{
    struct statfs fs;

    return fstatfs(fd, &fs) == 0 && fs.f_type == HUGETLBFS_MAGIC ? (uint64_t)fs.f_bsize : (uint64_t)sysconf(_SC_PAGESIZE);
}

int guest_region_map(struct guest_region *region, int fd, uint64_t guest_address, uint64_t user_address,
                     uint64_t nbytes, uint64_t mmap_offset)
{
    struct stat st;
    uint64_t end, skip, page, length;
    void *mapping;

    memset(region, 0, sizeof(*region));
    if (nbytes == 0 || wraps(guest_address, nbytes) || wraps(user_address, nbytes) ||
        __builtin_add_overflow(mmap_offset, nbytes, &end) || end > INT64_MAX)
        return -EINVAL;
    if (fstat(fd, &st) < 0)
        return -errno;
    /* What is past the end of the file was never there: see `loss.h` for what goes away later. */
    if (S_ISREG(st.st_mode) && end > (uint64_t)st.st_size)
        return -ENXIO;
    page = page_size(fd);
    skip = mmap_offset % page;
    length = (skip + nbytes + page - 1) / page * page; /* munmap of hugetlbfs wants whole pages */
    mapping = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, mmap_offset - skip);
    if (mapping == MAP_FAILED)
        return -errno;
    madvise(mapping, length, MADV_DONTDUMP);
    if (loss_expect(mapping, length, page, &loss_counter) < 0) {
        munmap(mapping, length);
        return -ENOMEM;
    }
    *region = (struct guest_region){
        .guest_address = guest_address,
        .user_address = user_address,
        .nbytes = nbytes,
        .host = (uint8_t *)mapping + skip,
        .mapping = mapping,
        .mapping_nbytes = length,
        .losses = loss_count_of(mapping),
    };
    return 0;
}

void guest_region_unmap(struct guest_region *region)
{
    if (region->mapping) {
        loss_forget(region->mapping); /* first: its place may be another's at once */
        munmap(region->mapping, region->mapping_nbytes);
    }
    memset(region, 0, sizeof(*region));
}

int guest_memory_add(struct guest_memory *memory, const struct guest_region *region)
{
    uint32_t at = memory->count;

    if (at == GUEST_REGIONS_MAX)
        return -E2BIG;
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct guest_region *other = &memory->regions[i];
        if (overlaps(region->guest_address, region->nbytes, other->guest_address, other->nbytes) ||
            overlaps(region->user_address, region->nbytes, other->user_address, other->nbytes))
            return -EEXIST;
        if (other->guest_address > region->guest_address && i < at)
            at = i;
    }
    memmove(&memory->regions[at + 1], &memory->regions[at], (memory->count - at) * sizeof(*region));
    memory->regions[at] = *region;
    memory->count++;
    memory->last = 0;
    return 0;
}

static bool holds(const struct guest_region *region, uint64_t guest_address)
{
    return guest_address - region->guest_address < region->nbytes && guest_address >= region->guest_address;
}

static const struct guest_region *find(struct guest_memory *memory, uint64_t guest_address)
{
    uint32_t low = 0, high = memory->count;

    if (high && holds(&memory->regions[memory->last], guest_address))
        return &memory->regions[memory->last];
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (memory->regions[middle].guest_address <= guest_address)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0 || !holds(&memory->regions[low - 1], guest_address))
        return NULL;
    memory->last = low - 1;
    return &memory->regions[low - 1];
}

int guest_memory_translate(struct guest_memory *memory, uint64_t guest_address, uint64_t nbytes,
                           struct iovec *pieces, int limit)
{
    int count = 0;

    if (wraps(guest_address, nbytes))
        return -EFAULT;
    while (nbytes) {
        const struct guest_region *region = find(memory, guest_address);
        uint64_t skip, run;

        if (!region)
            return -EFAULT;
        if (count == limit)
            return -E2BIG;
        skip = guest_address - region->guest_address;
        run = region->nbytes - skip < nbytes ? region->nbytes - skip : nbytes;
        pieces[count++] = (struct iovec){region->host + skip, run};
        guest_address += run;
        nbytes -= run;
    }
    return count;
}

bool guest_memory_locate(const struct guest_memory *memory, const void *host, uint64_t *guest_address)
{
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct guest_region *region = &memory->regions[i];
        uint64_t skip = (uintptr_t)host - (uintptr_t)region->host;

        if (skip < region->nbytes) {
            *guest_address = region->guest_address + skip;
            return true;
        }
    }
    return false;
}

bool guest_memory_has_lost(const struct guest_memory *memory, const void *host)
{
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct guest_region *region = &memory->regions[i];

        if (region->losses && (!host || (uintptr_t)host - (uintptr_t)region->host < region->nbytes) &&
            __atomic_load_n(region->losses, __ATOMIC_RELAXED))
            return true;
    }
    return false;
}

void *guest_memory_ring(const struct guest_memory *memory, uint64_t user_address, uint64_t nbytes)
{
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct guest_region *region = &memory->regions[i];
        uint64_t skip = user_address - region->user_address;

        if (user_address >= region->user_address && skip < region->nbytes && nbytes <= region->nbytes - skip)
            return region->host + skip;
    }
    return NULL;
}
