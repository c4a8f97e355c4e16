/* Windows: most of what a read of the page cache costs is the way into the kernel and to the page.
 *
 * Once a second page of a stretch has been read, the kernel is asked whether it
 * holds all of the stretch, which costs less than one more read.
 *
 * A page that is gone by now makes this thread wait for the disk once. It then
 * forgets what it has seen, and for a while looks nowhere: at most one wait a
 * WINDOW_REST_NS. A page that cannot be had any more counts as a loss (loss.h):
 * the read that says why follows, and the window stays closed.
 */
#include "ring/window.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "ring/host.h"
#include "ring/pace.h"

#define WINDOW_MIN (UINT64_C(1) << 30)
#define WINDOW_MAX (UINT64_C(1) << 40) /* 32 MiB to note what was seen, of which those pages exist that are used */
#define WINDOW_WAIT_NS 20000u          /* no copy takes so long, unless somebody else had the core */
#define WINDOW_REST_NS UINT64_C(1000000000)

#define STRETCH HOST_STRETCH /* pages, the bits of a word */

static uint64_t page_of(uint64_t host_offset)
{
    return host_offset / HOST_PAGE;
}

static uint64_t seen_nbytes(uint64_t nbytes)
{
    return nbytes / HOST_PAGE / 8;
}

static bool is_seen(const struct window *window, uint64_t host_offset, uint64_t nbytes)
{
    if (!nbytes || host_offset >= window->nbytes || nbytes > window->nbytes - host_offset)
        return false;
    for (uint64_t page = page_of(host_offset); page <= page_of(host_offset + nbytes - 1); page++)
        if (!(window->seen[page / STRETCH] >> page % STRETCH & 1))
            return false;
    return true;
}

static void copy(const struct gather *gather, const uint8_t *from)
{
    for (uint32_t i = 0; i < gather->count; i++) {
        memcpy(gather->iovecs[i].iov_base, from, gather->iovecs[i].iov_len);
        from += gather->iovecs[i].iov_len;
    }
}

static uint32_t losses_of(const struct window *window)
{
    return __atomic_load_n(&window->losses, __ATOMIC_RELAXED);
}

int64_t window_read(struct file *file, const struct gather *gather, uint64_t host_offset)
{
    struct window *window = &file->window;

    if (!is_seen(window, host_offset, gather->nbytes))
        return -EAGAIN;
    copy(gather, window->bytes + host_offset);
    if (!losses_of(window))
        return gather->nbytes;
    window_close(file);
    window->refused = true;
    return -EAGAIN;
}

/* Where the file may hang no page fault may wait for it, and what goes by O_DIRECT throws pages out. */
static bool is_wanted(const struct file *file)
{
    return !file->window.refused && file->storage == STORAGE_NEAR && file->direct_fd < 0;
}

uint64_t window_size(uint64_t end)
{
    uint64_t nbytes = WINDOW_MIN;

    while (nbytes < end)
        nbytes *= 2;
    return nbytes;
}

static void open_window(struct file *file, uint64_t nbytes)
{
    struct window *window = &file->window;
    uint64_t *seen = calloc(seen_nbytes(nbytes), 1);
    const uint8_t *bytes = seen ? host_map_file(file->fd, nbytes, false, &window->losses) : NULL;

    if (window->seen && bytes)
        memcpy(seen, window->seen, seen_nbytes(window->nbytes));
    window_close(file);
    window->refused = !bytes;
    if (!bytes) {
        free(seen);
        return;
    }
    window->bytes = bytes;
    window->nbytes = nbytes;
    window->seen = seen;
    window->waits = host_waits();
}

/* Whether to ask for the whole stretch: with 2, 4, 8 ... pages of it seen, so seldom in vain. */
static bool is_worth_asking(const struct window *window, uint64_t seen)
{
    uint32_t count = __builtin_popcountll(seen);

    return count > 1 && count > window->doubt && count < STRETCH && !(count & (count - 1));
}

/* To ask costs as much as two reads, where few pages are there: each no doubles what is seen before the next. */
static bool holds_stretch(struct window *window, uint64_t page)
{
    if (host_holds(window->bytes + page / STRETCH * STRETCH * HOST_PAGE)) {
        window->doubt = 0;
        return true;
    }
    if (window->doubt < STRETCH / 4)
        window->doubt = window->doubt ? 2 * window->doubt : 2;
    return false;
}

static void note_page(struct file *file, uint64_t page)
{
    struct window *window = &file->window;
    uint64_t *seen = &window->seen[page / STRETCH], bit = UINT64_C(1) << page % STRETCH;

    if (*seen & bit)
        return;
    *seen |= bit;
    if (is_worth_asking(window, *seen) && holds_stretch(window, page))
        *seen = UINT64_MAX;
}

void window_note(struct file *file, uint64_t host_offset, uint64_t nbytes, uint64_t now)
{
    struct window *window = &file->window;
    uint64_t end = host_offset + nbytes;

    if (!nbytes || end > WINDOW_MAX || now < window->resumes || !is_wanted(file))
        return;
    if (end > window->nbytes)
        open_window(file, window_size(end));
    if (!window->bytes)
        return;
    for (uint64_t page = page_of(host_offset); page <= page_of(end - 1); page++)
        note_page(file, page);
}

void window_ended(struct file *file, uint64_t began, uint64_t ended)
{
    struct window *window = &file->window;
    uint64_t waits;

    if (ended - began < WINDOW_WAIT_NS || !window->bytes)
        return;
    waits = host_waits();
    if (waits == window->waits)
        return;
    window->waits = waits;
    window->resumes = ended + WINDOW_REST_NS;
    memset(window->seen, 0, seen_nbytes(window->nbytes));
}

void window_close(struct file *file)
{
    struct window *window = &file->window;

    if (window->bytes)
        host_unmap_file(window->bytes, window->nbytes);
    free(window->seen);
    window->bytes = NULL;
    window->seen = NULL;
    window->nbytes = 0;
}
