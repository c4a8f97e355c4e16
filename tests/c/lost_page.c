/* What a loss replaces: bytes of the mapping it is in, and no others, whatever a file system says of its blocks. */
#include <sys/stat.h>
#include <sys/syscall.h>

#include "ring/loss.h"
#include "tests/c/fixture.h"

#define PAGE 4096u
#define BLOCK (1u << 20)
#define REGION_NBYTES (2u << 20)

/* As FUSE, NFS or ZFS would answer. */
int fstat(int fd, struct stat *st)
{
    int result = syscall(SYS_fstat, fd, st);

    st->st_blksize = BLOCK;
    return result;
}

/* Lose the page at `offset` of a mapping that is told to have pages of BLOCK bytes, between a page before and one after
 * that are somebody else's. `ahead`: of the mapping, from a place that BLOCK divides. */
static void lose_between_others(uint64_t ahead, uint64_t offset)
{
    uint64_t all = 2 * (uint64_t)BLOCK + ahead + PAGE + REGION_NBYTES;
    uint8_t *reserved = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint8_t *place = (uint8_t *)(((uintptr_t)reserved + 2 * (uintptr_t)BLOCK - 1) / BLOCK * BLOCK) + ahead;
    uint8_t *before = place - PAGE, *after = place + REGION_NBYTES;
    int fd = new_memfd("region", REGION_NBYTES);
    uint32_t losses = 0;

    CHECK(reserved != MAP_FAILED && before >= reserved && after + PAGE <= reserved + all);
    memset(before, 0xca, PAGE);
    memset(after, 0xca, PAGE);
    CHECK(mmap(place, REGION_NBYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == place);
    CHECK(loss_expect(place, REGION_NBYTES, BLOCK, &losses) == 0);
    place[offset] = 1;
    CHECK(ftruncate(fd, 0) == 0);
    CHECK(*(volatile uint8_t *)(place + offset) == 0);
    CHECK(losses == 1);
    for (uint32_t i = 0; i < PAGE; i++)
        CHECK(before[i] == 0xca && after[i] == 0xca);
    loss_forget(place);
    munmap(reserved, all);
    close(fd);
}

static void map_by_pages(void)
{
    int fd = new_memfd("region", REGION_NBYTES);
    struct guest_region region;

    CHECK(guest_region_map(&region, fd, 0, 0, REGION_NBYTES - PAGE, PAGE) == 0);
    CHECK(region.mapping_nbytes == REGION_NBYTES - PAGE && region.host == region.mapping);
    guest_region_unmap(&region);
    close(fd);
}

int main(void)
{
    lose_between_others(0, PAGE);
    for (uint64_t ahead = PAGE; ahead < BLOCK; ahead += BLOCK / 4) {
        lose_between_others(ahead, 0);
        lose_between_others(ahead, REGION_NBYTES - 1);
    }
    map_by_pages();
    return 0;
}
