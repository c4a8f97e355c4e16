#include "ring/word.h"

#include <errno.h>
#include <string.h>

#include "ring/device.h"
#include "ring/host.h"
#include "ring/window.h"

/* A file that may hang must not do so in a page fault; and a store takes no lock of the file's, so it may not meet
 * O_DIRECT in its page. One that could not be mapped is not asked again. */
static bool is_wanted(const struct file *file)
{
    return !file->words.refused && storage_is_near(file->storage) && file->direct_fd < 0;
}

/* Let the file be mapped to `end` at least. -> whether it is */
static bool map(struct file *file, uint64_t end)
{
    struct words *words = &file->words;
    uint64_t nbytes = window_size(end);
    uint8_t *bytes;

    if (end <= words->nbytes)
        return true;
    bytes = host_map_file(file->fd, nbytes, true, &words->losses);
    words->refused = !bytes;
    if (!bytes)
        return false;
    word_forget(file);
    words->bytes = bytes;
    words->nbytes = nbytes;
    return true;
}

/* In its last page, behind its end, a file takes a store and keeps nothing of it. Of a disk we know no end. */
static bool is_inside(struct file *file, uint64_t end)
{
    uint64_t length;

    if (!is_wanted(file) || !map(file, end) || host_length(file->fd, &length) < 0)
        return false;
    if (length == UINT64_MAX)
        length = HOST_PAGE;
    file->words.length = length < file->words.nbytes ? length : file->words.nbytes;
    return end <= file->words.length;
}

void worker_cut_file(struct worker *worker, uint32_t slot, uint64_t nbytes)
{
    struct words *words = &worker->files[slot].words;

    if (nbytes < words->length)
        words->length = nbytes;
}

void word_forget(struct file *file)
{
    if (file->words.bytes)
        host_unmap_file(file->words.bytes, file->words.nbytes);
    file->words.bytes = NULL;
    file->words.nbytes = file->words.length = 0;
}

static uint32_t losses_of(const struct words *words)
{
    return __atomic_load_n(&words->losses, __ATOMIC_RELAXED);
}

/* As one store: neither a death nor the disk sees a part of it. What is next to it in the word may change meanwhile. */
static void store(uint64_t *word, const void *bytes, uint32_t nbytes)
{
    uint64_t old = __atomic_load_n(word, __ATOMIC_RELAXED), new;

    do {
        new = old;
        memcpy(&new, bytes, nbytes);
    } while (!__atomic_compare_exchange_n(word, &old, new, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED));
}

bool word_store(struct file *file, uint64_t host_offset, const void *bytes, uint32_t nbytes)
{
    struct words *words = &file->words;
    uint64_t end = host_offset + sizeof(uint64_t);
    uint32_t losses = losses_of(words);

    ASSERT(host_offset % sizeof(uint64_t) == 0 && nbytes <= sizeof(uint64_t));
    if (end > words->length && !is_inside(file, end))
        return false;
    ASSERT(words->bytes && end <= words->nbytes);
    store((uint64_t *)(words->bytes + host_offset), bytes, nbytes);
    if (losses == losses_of(words))
        return true;
    word_forget(file); /* without space, or the disk fails: the write says which */
    words->refused = true;
    return false;
}

int worker_write_word(struct worker *worker, uint32_t slot, uint64_t host_offset, const void *bytes, uint32_t nbytes)
{
    struct file *file = &worker->files[slot];

    if (file->error)
        return -EIO;
    if (!worker->trace && word_store(file, host_offset, bytes, nbytes))
        return 0;
    return worker_write_entry(worker, slot, host_offset, bytes, nbytes);
}
