#include "qcow2/native.h"
int qcow2_native_abi(void) { return 1; }
