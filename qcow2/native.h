#pragma once
int qcow2_native_abi(void);
