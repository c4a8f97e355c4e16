/* What we rely on and nobody but we can break: states, counts, bounds. Never bytes that a peer or an image controls.
 *
 * On in the simulator, the fuzzers and the sanitized builds (-DASSERTIONS); the product carries none.
 */
#pragma once

#ifdef ASSERTIONS
#include <stdio.h>
#include <stdlib.h>

#define ASSERT(claim)                                                                                                  \
    do {                                                                                                               \
        if (!(claim)) {                                                                                                \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #claim);                                        \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)
#else
#define ASSERT(claim) ((void)sizeof(claim))
#endif
