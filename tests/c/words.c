/* Words that are stored through a mapping: what the file holds then, at its end, and when its pages are gone. */
#include <errno.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "tests/c/fixture.h"

#define LENGTH 5000u /* in the midst of a page */

struct words_of {
    struct fixture fixture;
    uint32_t slot;
    int fd;
};

static void begin(struct words_of *words)
{
    struct file_traits traits;

    fixture_init(&words->fixture, false);
    worker_set_trace(words->fixture.worker, NULL);
    words->fd = new_memfd("words", LENGTH);
    worker_look_at(words->fd, -1, &traits);
    words->slot = worker_add_file(words->fixture.worker, words->fd, -1, true, &traits);
}

static void end(struct words_of *words)
{
    fixture_deinit(&words->fixture);
    close(words->fd);
}

static struct words *mapping_of(struct words_of *words)
{
    return &words->fixture.worker->files[words->slot].words;
}

static int write_entry(struct words_of *words, uint64_t host_offset, uint64_t entry)
{
    struct table_writer tables = worker_table_writer(words->fixture.worker);
    int result;

    do
        result = tables.writer.write(&tables.writer, words->slot, host_offset, &entry, sizeof(entry));
    while (result == -EAGAIN); /* this thread was held up */
    return result;
}

static void check_holds(struct words_of *words, uint64_t host_offset, uint64_t entry)
{
    uint64_t held = 0;

    CHECK(pread(words->fd, &held, sizeof(held), host_offset) == sizeof(held));
    CHECK(held == entry);
}

static uint64_t length_of(struct words_of *words)
{
    struct stat st;

    CHECK(fstat(words->fd, &st) == 0);
    return st.st_size;
}

static void check_inside(void)
{
    struct words_of words;

    begin(&words);
    CHECK(write_entry(&words, 4096, 1) == 0);
    CHECK(mapping_of(&words)->bytes);
    check_holds(&words, 4096, 1);
    CHECK(worker_write_word(words.fixture.worker, words.slot, 8, "1234567", 7) == 0);
    check_holds(&words, 8, 0x37363534333231);
    CHECK(length_of(&words) == LENGTH);
    end(&words);
}

/* A store behind the end, in the same page, would be lost without a word. */
static void check_end(void)
{
    struct words_of words;

    begin(&words);
    CHECK(write_entry(&words, LENGTH - 8, 1) == 0);
    CHECK(write_entry(&words, LENGTH, 2) == 0);
    check_holds(&words, LENGTH, 2);
    CHECK(length_of(&words) == LENGTH + 8);
    CHECK(write_entry(&words, 9 * HOST_PAGE, 3) == 0);
    check_holds(&words, 9 * HOST_PAGE, 3);
    worker_cut_file(words.fixture.worker, words.slot, LENGTH - 496);
    CHECK(ftruncate(words.fd, LENGTH - 496) == 0);
    CHECK(write_entry(&words, LENGTH - 400, 4) == 0);
    check_holds(&words, LENGTH - 400, 4);
    CHECK(length_of(&words) == LENGTH - 392);
    CHECK(mapping_of(&words)->bytes && !mapping_of(&words)->losses);
    end(&words);
}

/* Past the mapping's end there is another one. */
static void check_growth(void)
{
    struct words_of words;

    begin(&words);
    CHECK(write_entry(&words, 0, 1) == 0);
    CHECK(mapping_of(&words)->nbytes == UINT64_C(1) << 30);
    CHECK(ftruncate(words.fd, UINT64_C(3) << 30) == 0);
    CHECK(write_entry(&words, UINT64_C(2) << 30, 2) == 0);
    CHECK(mapping_of(&words)->nbytes == UINT64_C(4) << 30);
    check_holds(&words, 0, 1);
    check_holds(&words, UINT64_C(2) << 30, 2);
    end(&words);

    begin(&words);
    CHECK(ftruncate(words.fd, UINT64_C(3) << 30) == 0);
    CHECK(write_entry(&words, 0, 1) == 0);
    CHECK(write_entry(&words, UINT64_C(2) << 30, 2) == 0);
    check_holds(&words, UINT64_C(2) << 30, 2);
    end(&words);
}

/* What was stored to a page that is gone is written, or its error told. */
static void check_loss(void)
{
    struct rlimit limit, none;
    struct words_of words;

    begin(&words);
    CHECK(write_entry(&words, 0, 1) == 0);
    CHECK(ftruncate(words.fd, 0) == 0);
    CHECK(write_entry(&words, 4096, 2) == 0);
    check_holds(&words, 4096, 2);
    CHECK(!mapping_of(&words)->bytes);
    CHECK(write_entry(&words, 4104, 3) == 0);
    CHECK(!mapping_of(&words)->bytes);
    check_holds(&words, 4104, 3);
    end(&words);

    begin(&words);
    CHECK(write_entry(&words, 0, 1) == 0);
    CHECK(ftruncate(words.fd, 0) == 0);
    CHECK(getrlimit(RLIMIT_FSIZE, &limit) == 0);
    none = (struct rlimit){0, limit.rlim_max};
    CHECK(setrlimit(RLIMIT_FSIZE, &none) == 0);
    CHECK(write_entry(&words, 0, 2) == -EFBIG);
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(length_of(&words) == 0);
    end(&words);
}

int main(void)
{
    signal(SIGXFSZ, SIG_IGN);
    check_inside();
    check_end();
    check_growth();
    check_loss();
    return 0;
}
