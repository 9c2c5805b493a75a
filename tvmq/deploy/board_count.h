/* How many instructions this process has run, in a qemu that has count_plugin.c. */
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MARK = 0x7471 }; /* the same in count_plugin.c */

/* Instructions so far; 0 where nobody counts them. descriptors: of a pipe that does not block. */
static uint64_t instructions(const int descriptors[2]) {
  uint64_t count = 0;
  syscall(MARK, descriptors[1]);
  return read(descriptors[0], &count, sizeof count) == sizeof count ? count : 0;
}
