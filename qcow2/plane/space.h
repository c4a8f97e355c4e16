/* What a lack of space means, for the map and for the engine.
 *
 * A table's entries and a refcount lie inside one cluster that the file has
 * already: a write of them that lacked space has changed nothing, and its caller
 * leaves memory as it was. So it is no reason to take no more writes.
 */
#pragma once

#include <errno.h>

static inline int lacks_space(int error)
{
    return error == -ENOSPC || error == -EDQUOT;
}
