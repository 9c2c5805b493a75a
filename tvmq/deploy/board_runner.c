/* Runs and measures bundles, and serves TVM's RPC, on a board that has TVM's runtime libraries and nothing else: no
 * Python, no compiler.
 *
 *     tvmq-runner run BUNDLE [--input NAME=FILE.npy]... [--output FOLDER] [--threads N]
 *     tvmq-runner bench BUNDLE [--input NAME=FILE.npy]... [--repeat N] [--threads N]
 *     tvmq-runner serve --secret FILE|none|- [--host ADDRESS] [--port N] [--until-stdin-closes] [--emulated]
 *
 * Without --input the bundle's example inputs are run, and the outputs compared with the bundle's. The
 * server lets those in who know the secret in FILE (-: the first line of stdin; none: everybody), on the loopback
 * interface and any free port unless told otherwise. Exit codes: 0 done, 1 the outputs differ from those of an exact
 * bundle, 2 bad input.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <sys/auxv.h>
#include <time.h>
#include <unistd.h>

#include <tvm/ffi/c_api.h>

#include "board_files.h"
#include "board_serve.h"

enum { MOST_TENSORS = 64, SCHEMA = 1, MANIFEST_LIMIT = 64 << 20, CPU = 1, POOLED = 2 };

/* ---- TVM's functions ---- */

static void tvm_failed(const char* what) {
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  TVMFFIByteArray said = {"no reason given", 15};
  if (error != NULL) said = ((TVMFFIErrorCell*)((char*)error + sizeof(TVMFFIObject)))->message;
  const char* line = memchr(said.data, '\n', said.size);
  fail("%s: %.*s", what, (int)(line != NULL ? line - said.data : (long)said.size), said.data);
}

static TVMFFIAny integer(int64_t value) { return (TVMFFIAny){.type_index = kTVMFFIInt, .v_int64 = value}; }
static TVMFFIAny raw(const char* text) { return (TVMFFIAny){.type_index = kTVMFFIRawStr, .v_c_str = text}; }

static TVMFFIAny call(TVMFFIObjectHandle function, int count, TVMFFIAny* arguments, const char* what) {
  TVMFFIAny result = {0};
  if (TVMFFIFunctionCall(function, arguments, count, &result) != 0) tvm_failed(what);
  return result;
}

static TVMFFIAny call_global(const char* name, int count, TVMFFIAny* arguments, const char* what) {
  TVMFFIByteArray bytes = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  if (TVMFFIFunctionGetGlobal(&bytes, &function) != 0 || function == NULL) fail("this TVM runtime has no %s", name);
  TVMFFIAny result = call(function, count, arguments, what);
  TVMFFIObjectDecRef(function);
  return result;
}

static TVMFFIObjectHandle method(TVMFFIAny module, const char* name) {
  TVMFFIAny query[3] = {module, raw(name), {.type_index = kTVMFFIBool, .v_int64 = 1}};
  TVMFFIAny found = call_global("ffi.ModuleGetFunction", 3, query, name);
  if (found.type_index != kTVMFFIFunction) fail("the bundle's library has no %s", name);
  return found.v_obj;
}

/* ---- The manifest: JSON as TVM's objects ---- */

static TVMFFIAny item(TVMFFIAny map, const char* key) {
  TVMFFIAny query[2] = {map, raw(key)};
  return call_global("ffi.MapGetItem", 2, query, key);
}

static TVMFFIAny element(TVMFFIAny list, int64_t index) {
  TVMFFIAny query[2] = {list, integer(index)};
  return call_global("ffi.ArrayGetItem", 2, query, "the manifest");
}

static int64_t length_of(TVMFFIAny list) { return call_global("ffi.ArraySize", 1, &list, "the manifest").v_int64; }

static int has(TVMFFIAny map, const char* key) {
  TVMFFIAny query[2] = {map, raw(key)};
  return call_global("ffi.MapCount", 2, query, key).v_int64 != 0;
}

static size_t number(TVMFFIAny map, const char* key) {
  TVMFFIAny found = item(map, key);
  if (found.type_index != kTVMFFIInt || found.v_int64 < 0) fail("the manifest: %s is no size", key);
  return (size_t)found.v_int64;
}

/* A copy that lasts. */
static const char* text(TVMFFIAny value) {
  TVMFFIByteArray found = {NULL, 0};
  if (value.type_index == kTVMFFISmallStr) found = (TVMFFIByteArray){value.v_bytes, value.small_str_len};
  if (value.type_index == kTVMFFIStr) found = *(const TVMFFIByteArray*)(value.v_obj + 1);
  if (found.data == NULL) fail("the manifest: a text is missing");
  char* copy = allocate(found.size + 1);
  memcpy(copy, found.data, found.size);
  copy[found.size] = '\0';
  return copy;
}

/* ---- Tensors ---- */

typedef struct {
  const char *name, *dtype;
  char descr[8], shape[256];
  size_t count, item_size;
  TVMFFIAny tensor;
  uint8_t* data;
} array;

static void describe_dtype(array* a) {
  TVMFFIByteArray name = {a->dtype, strlen(a->dtype)};
  DLDataType type;
  if (TVMFFIDataTypeFromString(&name, &type) != 0) tvm_failed(a->dtype);
  a->item_size = (size_t)(type.bits * type.lanes + 7) / 8;
  /* NumPy's letters by DLPack's codes: int, uint, float, a handle, bfloat, complex, bool. */
  char letter = type.code < 7 ? "iuf?V?b"[type.code] : '?';
  if (letter == '?' || a->item_size == 0) fail("the manifest: dtype %s", a->dtype);
  snprintf(a->descr, sizeof a->descr, "%c%c%zu", a->item_size == 1 ? '|' : '<', letter, a->item_size);
}

/* An array as the manifest describes it: name, dtype, shape; its tensor is allocated. */
static array make_array(TVMFFIAny entry) {
  array a = {.name = text(item(entry, "name")), .dtype = text(item(entry, "dtype")), .count = 1};
  describe_dtype(&a);
  TVMFFIAny dims[8], shape = item(entry, "shape");
  int64_t rank = length_of(shape);
  if (rank > 8) fail("the manifest: %s has %d dimensions", a.name, (int)rank);
  size_t used = (size_t)snprintf(a.shape, sizeof a.shape, "(");
  for (int64_t i = 0; i < rank; i++) {
    dims[i] = element(shape, i);
    if (dims[i].type_index != kTVMFFIInt || dims[i].v_int64 < 0 || dims[i].v_int64 > INT32_MAX) fail("%s: its shape", a.name);
    if (__builtin_mul_overflow(a.count, (size_t)dims[i].v_int64, &a.count) || a.count > SIZE_MAX / 16) fail("%s: its shape", a.name);
    used += (size_t)snprintf(a.shape + used, sizeof a.shape - used, "%s%lld", i ? ", " : "", (long long)dims[i].v_int64);
  }
  snprintf(a.shape + used, sizeof a.shape - used, rank == 1 ? ",)" : ")");
  TVMFFIByteArray name = {a.dtype, strlen(a.dtype)};
  TVMFFIAny arguments[4] = {call_global("ffi.Shape", (int)rank, dims, a.name),
                            {.type_index = kTVMFFIDataType},
                            {.type_index = kTVMFFIDevice, .v_device = {kDLCPU, 0}},
                            {.type_index = kTVMFFINone}};
  if (TVMFFIDataTypeFromString(&name, &arguments[1].v_dtype) != 0) tvm_failed(a.dtype);
  a.tensor = call_global("runtime.TVMTensorAllocWithScope", 4, arguments, a.name);
  a.data = ((DLTensor*)((char*)a.tensor.v_obj + sizeof(TVMFFIObject)))->data;
  return a;
}

/* Fill from params.bin: dense, or a bit for each element that is there, the highest first, and those that are. */
static void fill_parameter(array* a, TVMFFIAny entry, bytes block) {
  size_t offset = number(entry, "offset"), dense = a->count * a->item_size, bits = (a->count + 7) / 8;
  int sparse = has(entry, "nonzero");
  size_t kept = sparse ? number(entry, "nonzero") : 0, size = dense;
  if (kept > a->count) fail("parameter %s: expected at most %zu elements, saw %zu", a->name, a->count, kept);
  if (sparse) size = bits + kept * a->item_size;
  if (offset > block.size || size > block.size - offset) fail("parameter %s: expected inside params.bin", a->name);
  const uint8_t *flags = block.data + offset, *next = flags + bits;
  if (!sparse) {
    memcpy(a->data, flags, dense);
    return;
  }
  memset(a->data, 0, dense);
  size_t seen = 0;
  for (size_t i = 0; i < a->count; i++) {
    if (!(flags[i / 8] >> (7 - i % 8) & 1)) continue;
    if (seen++ == kept) break;
    memcpy(a->data + i * a->item_size, next, a->item_size);
    next += a->item_size;
  }
  if (seen != kept) fail("parameter %s: expected %zu elements, saw another number of bits", a->name, kept);
}

/* ---- Bundles ---- */

typedef struct {
  const char* path;
  bytes file, golden;
  TVMFFIAny manifest;
  array inputs[MOST_TENSORS], outputs[MOST_TENSORS];
  int input_count, output_count;
} bundle;

static int is_known(const uint8_t* name, size_t length) {
  static const char* const known[] = {"manifest.json", "lib.so",      "params.bin",
                                      "golden.npz",    "oracle.json", "calibration.json"};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (strlen(known[i]) == length && memcmp(known[i], name, length) == 0) return 1;
  return 0;
}

static bytes member(const bundle* b, const char* name) {
  TVMFFIAny entry = item(item(b->manifest, "members"), name);
  size_t size = number(entry, "size");
  bytes data = zip_member(b->file, name, size, b->path);
  char sum[65];
  sha256_hex(data, sum);
  if (data.size != size || strcmp(sum, text(item(entry, "sha256"))) != 0)
    fail("bundle %s: %s: expected another sha256; it was changed after it was made: copy or compile it again", b->path, name);
  return data;
}

static void check_processor(const bundle* b) {
#if defined(__aarch64__)
  static const char arch[] = "aarch64";
  static const struct { const char* name; int word; unsigned long bit; } features[] = {
      {"neon", AT_HWCAP, 1ul << 1},      {"lse", AT_HWCAP, 1ul << 8},      {"fullfp16", AT_HWCAP, 1ul << 10},
      {"rdm", AT_HWCAP, 1ul << 12},      {"dotprod", AT_HWCAP, 1ul << 20}, {"sve", AT_HWCAP, 1ul << 22},
      {"sve2", AT_HWCAP2, 1ul << 1},     {"i8mm", AT_HWCAP2, 1ul << 13},   {"bf16", AT_HWCAP2, 1ul << 14}};
#else
  static const char arch[] = "x86_64";
  static const struct { const char* name; int word; unsigned long bit; } features[] = {{"", AT_HWCAP, 0}};
#endif
  const char* triple = text(item(item(b->manifest, "target"), "triple"));
  if (strncmp(triple, arch, strlen(arch)) != 0) fail("bundle %s: expected one for %s, saw %s", b->path, arch, triple);
  TVMFFIAny required = item(item(b->manifest, "isa"), "required_features");
  for (int64_t i = 0, count = length_of(required); i < count; i++) {
    const char* name = text(element(required, i));
    for (size_t k = 0; k < sizeof features / sizeof *features; k++)
      if (strcmp(features[k].name, name) == 0 && !(getauxval((unsigned long)features[k].word) & features[k].bit))
        fail("bundle %s: expected a CPU with %s, saw one without", b->path, name);
  }
}

static int describe(TVMFFIAny entries, array* out) {
  int64_t count = length_of(entries);
  if (count > MOST_TENSORS) fail("the manifest: %d tensors", (int)count);
  for (int64_t i = 0; i < count; i++) out[i] = make_array(element(entries, i));
  return (int)count;
}

static void open_bundle(bundle* b, const char* path) {
  b->path = path;
  b->file = read_file(path);
  const uint8_t* record;
  for (size_t place = 0; (record = next_record(b->file, &place, path)) != NULL;) {
    size_t length = little(record + 28, 2);
    if (record[46] >= '1' && record[46] <= '9' && memchr(record + 46, '/', length) != NULL)
      fail("bundle %s: expected a program for one size of inputs, saw several; compile it without --dynamic", path);
    if (!is_known(record + 46, length)) fail("bundle %s: an unknown member; do not use this file", path);
  }
  bytes json = zip_member(b->file, "manifest.json", MANIFEST_LIMIT, path);
  TVMFFIByteArray said = {(const char*)json.data, json.size};
  TVMFFIAny source = {0};
  if (TVMFFIStringFromByteArray(&said, &source) != 0) tvm_failed("manifest.json");
  b->manifest = call_global("ffi.json.Parse", 1, &source, "manifest.json");
  if (number(b->manifest, "schema") != SCHEMA) fail("bundle %s: expected schema %d", path, SCHEMA);
  check_processor(b);
  TVMFFIAny signature = item(b->manifest, "signature");
  b->input_count = describe(item(signature, "inputs"), b->inputs);
  b->output_count = describe(item(signature, "outputs"), b->outputs);
  b->golden = member(b, "golden.npz");
}

/* The values of the example tensor "input0", in place of what was asked for, or to compare with. */
static bytes golden(const bundle* b, const char* side, int index, const array* a) {
  char name[32];
  snprintf(name, sizeof name, "%s%d.npy", side, index);
  bytes file = zip_member(b->golden, name, b->golden.size, "golden.npz");
  return npy_values(file, a->descr, a->shape, a->count * a->item_size, name);
}

/* The library in the virtual machine, from a file that is gone when it is mapped. */
static TVMFFIAny load(const bundle* b) {
  const char* base = getenv("TMPDIR");
  char folder[1024], path[1040];
  snprintf(folder, sizeof folder, "%s/tvmq-runner-XXXXXX", base ? base : "/tmp");
  if (mkdtemp(folder) == NULL) fail("cannot make the folder %s: set TMPDIR to another", folder);
  snprintf(path, sizeof path, "%s/lib.so", folder);
  write_file(path, member(b, "lib.so"), (bytes){0});
  TVMFFIAny name = raw(path), library = {0};
  TVMFFIByteArray loader = {"ffi.ModuleLoadFromFile", 22};
  TVMFFIObjectHandle function = NULL;
  int failed = TVMFFIFunctionGetGlobal(&loader, &function) != 0 || TVMFFIFunctionCall(function, &name, 1, &library) != 0;
  unlink(path);
  rmdir(folder);
  if (failed) tvm_failed("the bundle's library");
  TVMFFIAny machine = call(method(library, "vm_load_executable"), 0, NULL, "the virtual machine");
  TVMFFIAny devices[3] = {integer(CPU), integer(0), integer(POOLED)};
  call(method(machine, "vm_initialization"), 3, devices, "the virtual machine");
  return machine;
}

/* ---- Commands ---- */

typedef struct {
  const char *path, *output, *inputs[MOST_TENSORS];
  int input_count, repeat, threads;
} request;

typedef struct {
  TVMFFIObjectHandle main;
  TVMFFIAny* arguments;
  int count;
} program;

static TVMFFIAny run_once(const program* p) { return call(p->main, p->count, p->arguments, "the run"); }

/* Returns whether all inputs are the bundle's examples. */
static int fill_inputs(bundle* b, const request* r) {
  int given = 0;
  for (int i = 0; i < b->input_count; i++) {
    array* a = &b->inputs[i];
    bytes values = {0};
    for (int k = 0; k < r->input_count; k++) {
      size_t length = strcspn(r->inputs[k], "=");
      if (strlen(a->name) != length || strncmp(a->name, r->inputs[k], length) != 0) continue;
      const char* path = r->inputs[k] + length + 1;
      values = npy_values(read_file(path), a->descr, a->shape, a->count * a->item_size, path);
      given++;
    }
    if (values.data == NULL) values = golden(b, "input", i, a);
    memcpy(a->data, values.data, values.size);
  }
  if (given != r->input_count) fail("--input: expected each of the bundle's inputs at most once, the first is %s", b->inputs[0].name);
  return given == 0;
}

static program prepare(bundle* b) {
  bytes block = member(b, "params.bin");
  TVMFFIAny entries = item(b->manifest, "parameters");
  int64_t count = length_of(entries);
  program p = {.count = b->input_count + (int)count};
  p.arguments = allocate((size_t)p.count * sizeof *p.arguments);
  for (int i = 0; i < b->input_count; i++) p.arguments[i] = b->inputs[i].tensor;
  for (int64_t i = 0; i < count; i++) {
    TVMFFIAny entry = element(entries, i);
    array parameter = make_array(entry);
    fill_parameter(&parameter, entry, block);
    p.arguments[b->input_count + i] = parameter.tensor;
  }
  p.main = method(load(b), "main");
  return p;
}

static TVMFFIAny output_of(const bundle* b, TVMFFIAny result, int index) {
  TVMFFIAny found = result.type_index == kTVMFFITensor ? result : element(result, index);
  DLTensor* tensor = (DLTensor*)((char*)found.v_obj + sizeof(TVMFFIObject));
  size_t count = 1;
  for (int i = 0; i < tensor->ndim; i++) count *= (size_t)tensor->shape[i];
  if (found.type_index != kTVMFFITensor || count != b->outputs[index].count) fail("output %d: another shape", index);
  return found;
}

static int run(bundle* b, const request* r, int examples) {
  program p = prepare(b);
  TVMFFIAny result = run_once(&p);
  int differing = 0;
  if (r->output != NULL && mkdir(r->output, 0777) != 0 && access(r->output, W_OK) != 0) fail("cannot write %s", r->output);
  for (int i = 0; i < b->output_count; i++) {
    const array* a = &b->outputs[i];
    DLTensor* tensor = (DLTensor*)((char*)output_of(b, result, i).v_obj + sizeof(TVMFFIObject));
    bytes values = {(uint8_t*)tensor->data + tensor->byte_offset, a->count * a->item_size};
    /* The name is the bundle's, and the file is to be in this folder. */
    if (strchr(a->name, '/') != NULL || a->name[0] == '.' || strlen(a->name) > 200) fail("output %d: its name", i);
    char path[2048];
    snprintf(path, sizeof path, "%s/%s.npy", r->output ? r->output : "", a->name);
    if (r->output != NULL) write_npy(path, a->descr, a->shape, values);
    int equal = examples && memcmp(values.data, golden(b, "output", i, a).data, values.size) == 0;
    differing += examples && !equal;
    printf("%s %s %s%s\n", a->name, a->dtype, a->shape, !examples ? "" : equal ? " as expected" : " differs from the example");
  }
  TVMFFIAny exact = item(b->manifest, "exact");
  return differing && exact.type_index == kTVMFFIBool && exact.v_int64 ? 1 : 0;
}

static double milliseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static int by_size(const void* one, const void* two) {
  double a = *(const double*)one, b = *(const double*)two;
  return (a > b) - (a < b);
}

static void release(TVMFFIAny result) {
  if (result.type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(result.v_obj);
}

static int bench(bundle* b, const request* r) {
  enum { WARM_UP = 3 };
  program p = prepare(b);
  double* times = allocate((size_t)r->repeat * sizeof *times);
  for (int i = 0; i < WARM_UP + r->repeat; i++) {
    double start = milliseconds();
    TVMFFIAny result = run_once(&p);
    if (i >= WARM_UP) times[i - WARM_UP] = milliseconds() - start;
    release(result);
  }
  qsort(times, (size_t)r->repeat, sizeof *times, by_size);
  printf("%.3f ms median, %.3f p90, %.3f min (%d repeats, %d threads)\n", times[r->repeat / 2],
         times[(r->repeat - 1) * 9 / 10], times[0], r->repeat, r->threads);
  return 0;
}

static int positive(const char* option, const char* value) {
  char* end = NULL;
  long found = strtol(value, &end, 10);
  if (*end != '\0' || found < 1 || found > 1000000) fail("%s: expected a number from 1 to 1000000, saw %s", option, value);
  return (int)found;
}

static void set_threads(int count, int replace) {
  char threads[16];
  snprintf(threads, sizeof threads, "%d", count);
  setenv("TVM_NUM_THREADS", threads, replace); /* before TVM makes its threads; it takes half of the processors */
}

static int processors(void) {
  cpu_set_t found;
  return sched_getaffinity(0, sizeof found, &found) == 0 ? CPU_COUNT(&found) : 1;
}

static request parse(int argc, char** argv) {
  request r = {.path = argv[2], .repeat = 20, .threads = processors()};
  for (int i = 3; i < argc; i += 2) {
    if (i + 1 == argc) fail("%s: expected a value after it", argv[i]);
    if (strcmp(argv[i], "--input") == 0 && r.input_count < MOST_TENSORS && strchr(argv[i + 1], '=') != NULL) {
      r.inputs[r.input_count++] = argv[i + 1];
    } else if (strcmp(argv[i], "--output") == 0) {
      r.output = argv[i + 1];
    } else if (strcmp(argv[i], "--repeat") == 0) {
      r.repeat = positive(argv[i], argv[i + 1]);
    } else if (strcmp(argv[i], "--threads") == 0) {
      r.threads = positive(argv[i], argv[i + 1]);
    } else {
      fail("%s %s: expected --input NAME=FILE.npy, --output FOLDER, --repeat N or --threads N", argv[i], argv[i + 1]);
    }
  }
  return r;
}

static int start_server(int argc, char** argv) {
  const char *host = "127.0.0.1", *port = "0", *secret = NULL;
  int until_stdin_closes = 0;
  for (int i = 2; i < argc; i++) {
    const char** value = strcmp(argv[i], "--host") == 0     ? &host
                         : strcmp(argv[i], "--port") == 0   ? &port
                         : strcmp(argv[i], "--secret") == 0 ? &secret
                                                            : NULL;
    if (value != NULL && i + 1 < argc)
      *value = argv[++i];
    else if (strcmp(argv[i], "--until-stdin-closes") == 0)
      until_stdin_closes = 1;
    else if (strcmp(argv[i], "--emulated") == 0)
      emulated = 1;
    else
      fail("%s: expected --secret FILE, --host ADDRESS, --port N, --until-stdin-closes or --emulated", argv[i]);
  }
  char* end = NULL;
  long number = strtol(port, &end, 10);
  if (*port == '\0' || *end != '\0' || number < 0 || number > 65535) fail("--port: expected 0 to 65535, saw %s", port);
  if (secret == NULL) fail("serve: expected --secret FILE; --secret none lets everybody in, who may run any code here");
  set_threads(processors(), 0);
  return serve(host, port, secret, until_stdin_closes);
}

int main(int argc, char** argv) {
  int benching = argc > 2 && strcmp(argv[1], "bench") == 0;
  if (argc > 1 && strcmp(argv[1], "serve") == 0) {
    int code = start_server(argc, argv);
    fflush(NULL);
    _exit(code);
  }
  if (argc < 3 || (!benching && strcmp(argv[1], "run") != 0))
    fail("usage: tvmq-runner run|bench BUNDLE [--input NAME=FILE.npy]... [--output FOLDER] [--repeat N] [--threads N], or serve --secret FILE");
  request r = parse(argc, argv);
  set_threads(r.threads, 1);
  static bundle b;
  open_bundle(&b, r.path);
  int examples = fill_inputs(&b, &r), code = benching ? bench(&b, &r) : run(&b, &r, examples);
  fflush(NULL);
  /* Not exit: destructors of TVM's thread pool and of loaded libraries have no order to run in. */
  _exit(code);
}
