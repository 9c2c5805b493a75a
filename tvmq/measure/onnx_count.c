/* Counts the instructions of an inference by ONNX Runtime, in a qemu that has count_plugin.c.
 *
 *     onnx-count LIBRARY MODEL FILE...
 *
 * On one thread, with all graph optimizations. FILE: the raw values of each input, in the model's order. After a run that
 * pays for what is done once, the counts of two more go to stdout, a line each. Exit code 2 where something fails.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include "board_count.h"

enum { MOST = 16, API_VERSION = 1, ERRORS_ONLY = 3 };

/* The part of OrtApi that is used (onnxruntime_c_api.h): functions are added at its end only. A status is NULL or an error. */
typedef struct {
  void* first[2];
  const char* (*error_message)(const void* status);
  void* (*create_environment)(int level, const char* name, void** environment);
  void* before_session[3];
  void* (*create_session)(const void* environment, const char* path, const void* options, void** session);
  void* before_run[1];
  void* (*run)(void* session, const void* options, const char* const* input_names, const void* const* inputs, size_t count,
               const char* const* output_names, size_t output_count, void** outputs);
  void* (*create_options)(void** options);
  void* before_threads[13];
  void* (*set_threads_of_operators)(void* options, int count);
  void* (*set_threads_of_graph)(void* options, int count);
  void* before_counts[4];
  void* (*input_count)(const void* session, size_t* count);
  void* (*output_count)(const void* session, size_t* count);
  void* before_type[1];
  void* (*input_type)(const void* session, size_t index, void** type);
  void* before_names[2];
  void* (*input_name)(const void* session, size_t index, void* allocator, char** name);
  void* (*output_name)(const void* session, size_t index, void* allocator, char** name);
  void* before_tensor[10];
  void* (*create_tensor)(void* allocator, const int64_t* shape, size_t rank, int dtype, void** tensor);
  void* before_data[2];
  void* (*tensor_data)(void* tensor, void** data);
  void* before_tensor_type[3];
  void* (*tensor_type)(const void* type, const void** tensor_type);
  void* before_dtype[4];
  void* (*dtype)(const void* tensor_type, int* dtype);
  void* (*rank)(const void* tensor_type, size_t* rank);
  void* (*shape)(const void* tensor_type, int64_t* shape, size_t rank);
  void* before_allocator[15];
  void* (*default_allocator)(void** allocator);
} ort_api;
_Static_assert(offsetof(ort_api, run) == 9 * sizeof(void*), "position of Run");
_Static_assert(offsetof(ort_api, create_tensor) == 48 * sizeof(void*), "position of CreateTensorAsOrtValue");
_Static_assert(offsetof(ort_api, default_allocator) == 78 * sizeof(void*), "position of GetAllocatorWithDefaultOptions");

typedef struct {
  const ort_api* (*api)(uint32_t version);
  const char* (*version)(void);
} ort_base;

static const ort_api* ort;

static void fail(const char* what, const char* why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(2);
}

static void check(const void* status, const char* what) {
  if (status != NULL) fail(what, ort->error_message(status));
}

static const ort_api* open_library(const char* path) {
  void* library = dlopen(path, RTLD_NOW);
  if (library == NULL) fail("the library", dlerror());
  const ort_base* (*base)(void) = (const ort_base* (*)(void))dlsym(library, "OrtGetApiBase");
  const ort_api* api = base == NULL ? NULL : base()->api(API_VERSION);
  if (api == NULL) fail(path, "no ONNX Runtime");
  return api;
}

/* Bytes of an element, by ONNXTensorElementDataType; 0 for those that no input here has. */
static size_t item_size(int dtype) {
  static const size_t sizes[] = {0, 4, 1, 1, 2, 2, 4, 8};
  return dtype > 0 && (size_t)dtype < sizeof sizes / sizeof *sizes ? sizes[dtype] : 0;
}

static void* read_input(const void* session, size_t index, void* allocator, const char* path) {
  void *type, *tensor, *data;
  const void* tensor_type;
  int dtype;
  size_t rank;
  int64_t shape[MOST];
  check(ort->input_type(session, index, &type), path);
  check(ort->tensor_type(type, &tensor_type), path);
  check(ort->dtype(tensor_type, &dtype), path);
  check(ort->rank(tensor_type, &rank), path);
  if (rank > MOST || item_size(dtype) == 0) fail(path, "an input of another kind");
  check(ort->shape(tensor_type, shape, rank), path);
  size_t size = item_size(dtype);
  for (size_t i = 0; i < rank; i++) {
    if (shape[i] < 0) fail(path, "an input without a shape");
    size *= (size_t)shape[i];
  }
  check(ort->create_tensor(allocator, shape, rank, dtype, &tensor), path);
  check(ort->tensor_data(tensor, &data), path);
  FILE* file = fopen(path, "rb");
  if (file == NULL || fread(data, 1, size, file) != size || fgetc(file) != EOF) fail(path, "values of another size");
  fclose(file);
  return tensor;
}

static void* open_session(const char* path) {
  void *environment, *options, *session;
  check(ort->create_environment(ERRORS_ONLY, "tvmq", &environment), "ONNX Runtime");
  check(ort->create_options(&options), "ONNX Runtime");
  check(ort->set_threads_of_operators(options, 1), "ONNX Runtime");
  check(ort->set_threads_of_graph(options, 1), "ONNX Runtime");
  check(ort->create_session(environment, path, options, &session), path);
  return session;
}

int main(int argc, char** argv) {
  if (argc < 3) fail("usage", "onnx-count LIBRARY MODEL FILE...");
  ort = open_library(argv[1]);
  void *session = open_session(argv[2]), *allocator;
  void *inputs[MOST], *outputs[MOST] = {NULL};
  char *input_names[MOST], *output_names[MOST];
  size_t given = (size_t)argc - 3, count, output_count;
  check(ort->default_allocator(&allocator), "ONNX Runtime");
  check(ort->input_count(session, &count), argv[2]);
  check(ort->output_count(session, &output_count), argv[2]);
  if (count != given || count > MOST || output_count > MOST) fail(argv[2], "another number of inputs");
  for (size_t i = 0; i < count; i++) {
    check(ort->input_name(session, i, allocator, &input_names[i]), argv[2]);
    inputs[i] = read_input(session, i, allocator, argv[3 + i]);
  }
  for (size_t i = 0; i < output_count; i++) check(ort->output_name(session, i, allocator, &output_names[i]), argv[2]);
  int descriptors[2];
  if (pipe2(descriptors, O_NONBLOCK) != 0) fail("the counter", "no pipe");
  for (int turn = 0; turn < 3; turn++) { /* the outputs of the first are those of the others */
    uint64_t start = instructions(descriptors);
    check(ort->run(session, NULL, (const char* const*)input_names, (const void* const*)inputs, count,
                   (const char* const*)output_names, output_count, outputs),
          argv[2]);
    uint64_t stop = instructions(descriptors);
    if (stop == 0) fail("the counter", "nobody counts instructions here");
    if (turn > 0) printf("%llu\n", (unsigned long long)(stop - start));
  }
  fflush(stdout);
  /* Not exit: nobody needs what the destructors of libraries do. */
  _exit(0);
}
