/* What the cipher's extension offers to its cffi wrapper: `cipher.cdef` repeats the prototypes. */
#pragma once

#include "qcow2/plane/cipher.h"
