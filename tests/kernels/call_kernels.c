/* Calls compiled kernels without TVM's runtime: call_kernels MEMORY PLAN.
 *
 * MEMORY has the bytes of all tensors, and is rewritten after the calls. PLAN has a line a call: the kernel's number and
 * how many tensors it takes, then of each DLPack's type code, its bits, where it starts in MEMORY, how many extents it
 * has, and these. KERNELS, of the command line, is KERNEL(name) of each kernel. Below is what their objects ask for.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>

enum { MOST_TENSORS = 16, MOST_EXTENTS = 8, ALIGNMENT = 64 };

#define KERNEL(name) int __tvm_ffi_##name(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
KERNELS
#undef KERNEL
#define KERNEL(name) {#name, __tvm_ffi_##name},
static const struct {
  const char* name;
  int (*call)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
} kernels[] = {KERNELS};

/* ---- what TVM's runtime has ---- */

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
  void* made = NULL;
  return posix_memalign(&made, ALIGNMENT, (size_t)size) == 0 ? made : NULL;
}

static int release(int device, int id, void* made) {
  (void)device, (void)id;
  free(made);
  return 0;
}

static void raised(const char* kind, const char* message) { fprintf(stderr, "%s: %s\n", kind, message); }

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; i++) fputs(parts[i] != NULL ? parts[i] : "", stderr);
  fputc('\n', stderr);
}

/* Objects read these from variables that TVM's loader fills. */
int (*__TVMBackendParallelLaunch)(task, void*, int) = launch;
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = release;
void (*__TVMFFIErrorSetRaisedFromCStr)(const char*, const char*) = raised;

/* ---- the program ---- */

static void stop(const char* what) {
  perror(what);
  exit(2);
}

static void* read_all(const char* path, size_t* size) {
  void* bytes = NULL;
  FILE* file = fopen(path, "rb");
  if (file == NULL || fseek(file, 0, SEEK_END) != 0) stop(path);
  *size = (size_t)ftell(file);
  rewind(file);
  if (posix_memalign(&bytes, ALIGNMENT, *size) != 0 || fread(bytes, 1, *size, file) != *size) stop(path);
  fclose(file);
  return bytes;
}

static void write_all(const char* path, const void* bytes, size_t size) {
  FILE* file = fopen(path, "wb");
  if (file == NULL || fwrite(bytes, 1, size, file) != size || fclose(file) != 0) stop(path);
}

static int64_t next(FILE* plan) {
  int64_t value;
  if (fscanf(plan, "%" SCNd64, &value) != 1) stop("plan");
  return value;
}

static void read_tensor(FILE* plan, char* memory, DLTensor* tensor, int64_t* shape) {
  *tensor = (DLTensor){.device = {kDLCPU, 0}, .dtype = {.lanes = 1}, .shape = shape};
  tensor->dtype.code = (uint8_t)next(plan);
  tensor->dtype.bits = (uint8_t)next(plan);
  tensor->data = memory + next(plan);
  tensor->ndim = (int32_t)next(plan);
  if (tensor->ndim > MOST_EXTENTS) stop("extents");
  for (int i = 0; i < tensor->ndim; i++) shape[i] = next(plan);
}

static int call(int64_t kernel, int count, FILE* plan, char* memory) {
  DLTensor tensors[MOST_TENSORS];
  int64_t shapes[MOST_TENSORS][MOST_EXTENTS];
  TVMFFIAny args[MOST_TENSORS] = {{0}}, result = {0};
  if (count > MOST_TENSORS) stop("tensors");
  for (int i = 0; i < count; i++) {
    read_tensor(plan, memory, &tensors[i], shapes[i]);
    args[i].type_index = kTVMFFIDLTensorPtr;
    args[i].v_ptr = &tensors[i];
  }
  int code = kernels[kernel].call(NULL, args, count, &result);
  if (code != 0) fprintf(stderr, "%s returned %d\n", kernels[kernel].name, code);
  return code;
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  size_t size;
  char* memory = read_all(argv[1], &size);
  FILE* plan = fopen(argv[2], "r");
  if (plan == NULL) stop(argv[2]);
  int64_t kernel;
  while (fscanf(plan, "%" SCNd64, &kernel) == 1)
    if (call(kernel, (int)next(plan), plan, memory) != 0) return 1;
  write_all(argv[1], memory, size);
  return 0;
}
