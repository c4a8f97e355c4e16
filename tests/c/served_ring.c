/* Well-behaved drivers of every habit: what is written is read back, whatever the splits. */
#include <linux/virtio_blk.h>

#include "tests/c/fixture.h"

#define DATA_NBYTES 4096u
#define TABLE_ADDRESS 65536u
#define DATA_ADDRESS 131072u

struct habit {
    uint32_t ring_flags;
    bool indirect;
    uint32_t piece_nbytes;
};

/* Describe header, data and status in buffers of piece_nbytes. -> their number */
static uint32_t cut(struct driver_buffer *buffers, uint64_t header, uint64_t data, bool is_read, uint32_t piece_nbytes)
{
    uint32_t count = 0;

    buffers[count++] = (struct driver_buffer){header, 16, false};
    for (uint32_t start = 0; start < DATA_NBYTES; start += piece_nbytes) {
        uint32_t left = DATA_NBYTES - start;
        buffers[count++] = (struct driver_buffer){data + start, left < piece_nbytes ? left : piece_nbytes, is_read};
    }
    buffers[count++] = (struct driver_buffer){header + 16, 1, true};
    return count;
}

static void ask(struct fixture *fixture, struct driver_ring *ring, const struct habit *habit, uint32_t type,
                uint64_t sector)
{
    static struct driver_buffer buffers[1024];
    struct virtio_blk_outhdr header = {type, 0, sector};
    uint64_t data = DATA_ADDRESS + 4096;
    uint32_t count = cut(buffers, DATA_ADDRESS, data, type == VIRTIO_BLK_T_IN, habit->piece_nbytes), nbytes = 0;
    uint8_t *host = fixture->region.host;

    memcpy(host + DATA_ADDRESS, &header, sizeof(header));
    host[DATA_ADDRESS + 16] = 0xff;
    CHECK(driver_ring_add(ring, buffers, count, habit->indirect ? host + TABLE_ADDRESS : NULL, TABLE_ADDRESS) >= 0);
    driver_ring_publish(ring);
    fixture_serve(fixture);
    CHECK(driver_ring_poll(ring, &nbytes) >= 0);
    CHECK(host[DATA_ADDRESS + 16] == VIRTIO_BLK_S_OK);
    CHECK(nbytes == (type == VIRTIO_BLK_T_IN ? DATA_NBYTES + 1 : 1));
}

static void serve(const struct habit *habit, bool use_threads)
{
    struct fixture fixture;
    struct driver_ring ring;
    uint8_t *data;

    fixture_init(&fixture, use_threads);
    fixture_start(&fixture, habit->ring_flags);
    driver_ring_init(&ring, fixture.region.host, QUEUE_SIZE, habit->ring_flags, fixture_base(habit->ring_flags));
    data = fixture.region.host + DATA_ADDRESS + 4096;
    for (uint32_t i = 0; i < 100; i++) {
        memset(data, i + 1, DATA_NBYTES);
        ask(&fixture, &ring, habit, VIRTIO_BLK_T_OUT, i * 8);
        memset(data, 0, DATA_NBYTES);
        ask(&fixture, &ring, habit, VIRTIO_BLK_T_IN, i * 8);
        CHECK(data[0] == i + 1 && data[DATA_NBYTES - 1] == i + 1);
    }
    fixture_drain(&fixture);
    fixture_deinit(&fixture);
}

int main(void)
{
    enum { NONE = 0, BOTH = RING_PACKED | RING_EVENT_IDX };
    static const struct habit habits[] = {
        {NONE, false, 4096},        {RING_EVENT_IDX, false, 4096}, {NONE, true, 512},
        {RING_EVENT_IDX, true, 7},  {NONE, true, 1000},            {RING_EVENT_IDX, false, 100},
        {RING_PACKED, false, 4096}, {BOTH, false, 4096},           {RING_PACKED, true, 512},
        {BOTH, true, 7},            {RING_PACKED, true, 1000},     {BOTH, false, 100},
    };

    for (size_t i = 0; i < sizeof(habits) / sizeof(*habits); i++) {
        serve(&habits[i], false);
        serve(&habits[i], true);
    }
    return 0;
}
