#include "ring/word.h"

#include <errno.h>
#include <string.h>

#include "ring/device.h"
#include "ring/host.h"

/* A file that may hang must not do so in a page fault; and a store takes no lock of the file's, so it may not meet
 * O_DIRECT in its page. One that could not be mapped is not asked again. */
static bool is_mapped(struct file *file)
{
    if (!file->word && !file->word_refused && storage_is_near(file->storage) && file->direct_fd < 0)
        file->word = host_map_page(file->fd, &file->word_losses);
    file->word_refused = !file->word;
    return file->word;
}

void word_forget(struct file *file)
{
    if (file->word)
        host_unmap_page(file->word);
    file->word = NULL;
}

/* As one store: neither a death nor the disk sees a part of it. What is next to it in the word may change meanwhile.
 * -> false: the page is gone, and with it what was stored. */
static bool store(const struct file *file, uint64_t host_offset, const void *bytes, uint32_t nbytes)
{
    uint64_t *word = file->word + host_offset / sizeof(*word);
    uint32_t losses = __atomic_load_n(&file->word_losses, __ATOMIC_RELAXED);
    uint64_t old = __atomic_load_n(word, __ATOMIC_RELAXED), new;

    do {
        new = old;
        memcpy(&new, bytes, nbytes);
    } while (!__atomic_compare_exchange_n(word, &old, new, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED));
    return losses == __atomic_load_n(&file->word_losses, __ATOMIC_RELAXED);
}

int worker_write_word(struct worker *worker, uint32_t slot, uint64_t host_offset, const void *bytes, uint32_t nbytes)
{
    struct file *file = &worker->files[slot];

    if (file->error)
        return -EIO;
    if (!worker->trace && host_offset + sizeof(uint64_t) <= HOST_PAGE && is_mapped(file)) {
        if (store(file, host_offset, bytes, nbytes))
            return 0;
        word_forget(file); /* without space, or the disk fails: the write says which */
        file->word_refused = true;
    }
    return worker_write_entry(worker, slot, host_offset, bytes, nbytes);
}
