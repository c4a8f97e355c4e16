#pragma once
int ring_native_abi(void);
