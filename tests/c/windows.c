/* How often the kernel is asked what it holds: seldom where few pages are there, at once where all are. */
#include <sys/syscall.h>

#include "ring/window.h"
#include "tests/c/fixture.h"

#define STRETCHES 256u
#define STRETCH_NBYTES (HOST_STRETCH * HOST_PAGE)

static uint32_t asked;

int mincore(void *bytes, size_t nbytes, unsigned char *held)
{
    asked++;
    return syscall(SYS_mincore, bytes, nbytes, held);
}

static struct file new_file(void)
{
    return (struct file){.fd = new_memfd("image", STRETCHES * STRETCH_NBYTES), .direct_fd = -1, .storage = STORAGE_NEAR};
}

static void end(struct file *file)
{
    window_close(file);
    close(file->fd);
}

static void make_pages(struct file *file, uint32_t stretch, uint32_t npages)
{
    char page[HOST_PAGE] = {1};

    for (uint32_t i = 0; i < npages; i++)
        CHECK(pwrite(file->fd, page, sizeof(page), stretch * STRETCH_NBYTES + i * HOST_PAGE) == sizeof(page));
}

static void note_pages(struct file *file, uint32_t stretch, uint32_t npages)
{
    for (uint32_t i = 0; i < npages; i++)
        window_note(file, stretch * STRETCH_NBYTES + i * HOST_PAGE, HOST_PAGE, 1);
}

static bool knows_all(struct file *file, uint32_t stretch)
{
    static char bytes[STRETCH_NBYTES];
    struct iovec all = {bytes, sizeof(bytes)};
    struct gather gather = {.iovecs = &all, .count = 1, .nbytes = sizeof(bytes)};

    return window_read(file, &gather, stretch * STRETCH_NBYTES) == sizeof(bytes);
}

static void check_sparse(void)
{
    struct file file = new_file();

    asked = 0;
    for (uint32_t stretch = 0; stretch < STRETCHES; stretch++) {
        make_pages(&file, stretch, 8);
        note_pages(&file, stretch, 8);
        CHECK(!knows_all(&file, stretch));
    }
    CHECK(asked && asked < 8);
    end(&file);
}

static void check_full(void)
{
    struct file file = new_file();

    make_pages(&file, 0, HOST_STRETCH - 1);
    note_pages(&file, 0, 32);
    make_pages(&file, 1, HOST_STRETCH);
    note_pages(&file, 1, 32); /* after some no */
    CHECK(!knows_all(&file, 0) && knows_all(&file, 1));
    asked = 0;
    for (uint32_t stretch = 2; stretch < STRETCHES; stretch++) {
        make_pages(&file, stretch, HOST_STRETCH);
        note_pages(&file, stretch, 2);
        CHECK(knows_all(&file, stretch));
    }
    CHECK(asked == STRETCHES - 2);
    end(&file);
}

int main(void)
{
    check_sparse();
    check_full();
    return 0;
}
