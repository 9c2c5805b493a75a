/* Calls compiled kernels without TVM's runtime, and without a C library, which zig would have to build first.
 *
 * It reads whole numbers of 64 bits: how many calls there are, and how many bytes all tensors take. Then, of each call,
 * the kernel's number and how many tensors it takes, and of each of these DLPack's type code, its bits, where it starts,
 * how many extents it has, and the extents. Then the tensors' bytes, which it writes after the calls. KERNELS, of the
 * command line, is KERNEL(name) of each kernel.
 */
#include <tvm/ffi/c_api.h>

enum { MOST_TENSORS = 16, MOST_EXTENTS = 8, MOST_BYTES = 1 << 25 };
enum { INPUT, OUTPUT, ERRORS };

#define KERNEL(name) int __tvm_ffi_##name(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
KERNELS
#undef KERNEL
#define KERNEL(name) {#name, __tvm_ffi_##name},
static const struct {
  const char* name;
  int (*call)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
} kernels[] = {KERNELS};

static char memory[MOST_BYTES] __attribute__((aligned(64)));
static char workspace[MOST_BYTES] __attribute__((aligned(64)));
static size_t taken;

/* ---- Linux ---- */

#if defined(__arm__)
enum { READ = 3, WRITE = 4, EXIT = 248 };
static long ask(long number, long a, long b, long c) {
  register long r0 __asm__("r0") = a, r1 __asm__("r1") = b, r2 __asm__("r2") = c, r7 __asm__("r7") = number;
  __asm__ volatile("svc 0" : "+r"(r0) : "r"(r1), "r"(r2), "r"(r7) : "memory");
  return r0;
}
#elif defined(__riscv)
enum { READ = 63, WRITE = 64, EXIT = 94 };
static long ask(long number, long a, long b, long c) {
  register long a0 __asm__("a0") = a, a1 __asm__("a1") = b, a2 __asm__("a2") = c, a7 __asm__("a7") = number;
  __asm__ volatile("ecall" : "+r"(a0) : "r"(a1), "r"(a2), "r"(a7) : "memory");
  return a0;
}
#endif

static void stop(int code) {
  for (;;) ask(EXIT, code, 0, 0);
}

static void move(long how, int file, char* bytes, size_t size) {
  while (size > 0) {
    long moved = ask(how, file, (long)bytes, (long)size);
    if (moved <= 0) stop(2);
    bytes += moved, size -= (size_t)moved;
  }
}

static void say(const char* text) {
  size_t size = 0;
  while (text != NULL && text[size] != '\0') size++;
  move(WRITE, ERRORS, (char*)text, size);
}

static int64_t next(void) {
  int64_t value;
  move(READ, INPUT, (char*)&value, sizeof(value));
  return value;
}

/* ---- what objects ask of TVM's runtime, and of the C library that zig has no part of ---- */

typedef struct {
  void* sync;
  int32_t tasks;
} environment;
typedef int (*task)(int id, environment* env, void* data);

/* One thread after the other, so that each does its own share of the work. */
static int launch(task run, void* data, int tasks) {
  environment env = {NULL, tasks > 0 ? tasks : 3};
  for (int id = 0; id < env.tasks; id++) {
    int code = run(id, &env, data);
    if (code != 0) return code;
  }
  return 0;
}

static void* allocate(int device, int id, uint64_t size, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  size_t start = taken;
  taken += ((size_t)size + 63) / 64 * 64;
  return taken <= sizeof(workspace) ? workspace + start : NULL;
}

static int release(int device, int id, void* made) {
  (void)device, (void)id, (void)made; /* all of it is free when the kernel is done */
  return 0;
}

static void raised(const char* kind, const char* message) { say(kind), say(": "), say(message), say("\n"); }

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  say(kind), say(": ");
  for (int32_t i = 0; i < count; i++) say(parts[i]);
  say("\n");
}

/* Objects read these from variables that TVM's loader fills. */
int (*__TVMBackendParallelLaunch)(task, void*, int) = launch;
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = release;
void (*__TVMFFIErrorSetRaisedFromCStr)(const char*, const char*) = raised;

void* memset(void* bytes, int value, size_t size) {
  for (size_t i = 0; i < size; i++) ((volatile char*)bytes)[i] = (char)value;
  return bytes;
}

void* memcpy(void* to, const void* from, size_t size) {
  for (size_t i = 0; i < size; i++) ((volatile char*)to)[i] = ((const char*)from)[i];
  return to;
}

/* Numbers of 2**23 and more are whole; sums with it are rounded, half to even. */
float nearbyintf(float x) {
  volatile float whole = __builtin_copysignf(0x1p23f, x);
  volatile float sum = x + whole;
  return __builtin_fabsf(x) < 0x1p23f ? __builtin_copysignf(sum - whole, x) : x;
}

/* ---- the program ---- */

typedef struct {
  DLTensor tensors[MOST_TENSORS];
  int64_t extents[MOST_TENSORS][MOST_EXTENTS];
  int kernel, count;
} call;

static void read_call(call* made) {
  made->kernel = (int)next();
  made->count = (int)next();
  if (made->count > MOST_TENSORS) stop(2);
  for (int i = 0; i < made->count; i++) {
    DLTensor* tensor = &made->tensors[i];
    *tensor = (DLTensor){.device = {kDLCPU, 0}, .dtype = {.lanes = 1}, .shape = made->extents[i]};
    tensor->dtype.code = (uint8_t)next();
    tensor->dtype.bits = (uint8_t)next();
    tensor->data = memory + next();
    tensor->ndim = (int32_t)next();
    if (tensor->ndim > MOST_EXTENTS) stop(2);
    for (int j = 0; j < tensor->ndim; j++) tensor->shape[j] = next();
  }
}

static void run(call* made) {
  TVMFFIAny args[MOST_TENSORS] = {{0}}, result = {0};
  for (int i = 0; i < made->count; i++) {
    args[i].type_index = kTVMFFIDLTensorPtr;
    args[i].v_ptr = &made->tensors[i];
  }
  taken = 0;
  if (kernels[made->kernel].call(NULL, args, made->count, &result) == 0) return;
  say(kernels[made->kernel].name), say(" failed\n");
  stop(1);
}

enum { MOST_CALLS = 512 };
static call calls[MOST_CALLS];

void _start(void) {
  int64_t count = next(), size = next();
  if (count > MOST_CALLS || size > MOST_BYTES) stop(2);
  for (int64_t i = 0; i < count; i++) read_call(&calls[i]);
  move(READ, INPUT, memory, (size_t)size);
  for (int64_t i = 0; i < count; i++) run(&calls[i]);
  move(WRITE, OUTPUT, memory, (size_t)size);
  stop(0);
}
