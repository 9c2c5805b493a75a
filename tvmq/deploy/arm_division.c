/* 32-bit ARM processors without a division (Cortex-A8) call a function for it, by these names where LLVM compiled the
 * kernels; zig's own runtime has it by the names of ARM's ABI only, which zig's compiler calls here. */
#define HIDDEN __attribute__((weak, visibility("hidden")))

HIDDEN int __divsi3(int a, int b) { return a / b; }
HIDDEN int __modsi3(int a, int b) { return a % b; }
HIDDEN unsigned __udivsi3(unsigned a, unsigned b) { return a / b; }
HIDDEN unsigned __umodsi3(unsigned a, unsigned b) { return a % b; }
