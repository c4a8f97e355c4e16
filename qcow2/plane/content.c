/* What bytes are, looked at in bulk: where they are zeros, where two buffers differ. */
#include <string.h>

#include "qcow2/native.h"

static int is_zero(const uint8_t *bytes, size_t nbytes)
{
    static const uint8_t zeros[16];

    if (nbytes <= sizeof(zeros))
        return memcmp(bytes, zeros, nbytes) == 0;
    return memcmp(bytes, zeros, sizeof(zeros)) == 0 &&
           memcmp(bytes, bytes + sizeof(zeros), nbytes - sizeof(zeros)) == 0;
}

size_t data_runs(const uint8_t *bytes, size_t nbytes, size_t unit, uint32_t *bounds)
{
    size_t count = 0, start, in_unit;
    int in_data = 0;

    for (start = 0; start < nbytes; start += unit) {
        in_unit = nbytes - start < unit ? nbytes - start : unit;
        if (is_zero(bytes + start, in_unit) == in_data) {
            bounds[count++] = (uint32_t)start;
            in_data = !in_data;
        }
    }
    if (in_data)
        bounds[count++] = (uint32_t)nbytes;
    return count;
}

size_t equal_bytes(const uint8_t *one, const uint8_t *other, size_t nbytes, size_t unit)
{
    size_t start = 0, in_unit;

    while (start < nbytes) {
        in_unit = nbytes - start < unit ? nbytes - start : unit;
        if (memcmp(one + start, other + start, in_unit) != 0) {
            if (in_unit <= 512)
                return start;
            return start + equal_bytes(one + start, other + start, in_unit, 512);
        }
        start += in_unit;
    }
    return nbytes;
}
