#include "ring/native.h"
int ring_native_abi(void) { return 1; }
