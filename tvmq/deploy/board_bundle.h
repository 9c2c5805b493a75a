/* Bundles on a board, by TVM's C interface: manifest, tensors, checks, and the library in the virtual machine. */
#include <sys/auxv.h>
#include <unistd.h>

#include <tvm/ffi/c_api.h>

#include "board_files.h"

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
  int64_t dims[8];
  int rank;
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

/* A shape as NumPy writes it: "(1, 2)". */
static void write_shape(char shape[256], const int64_t* dims, int rank) {
  size_t used = (size_t)snprintf(shape, 256, "(");
  for (int i = 0; i < rank; i++) used += (size_t)snprintf(shape + used, 256 - used, "%s%lld", i ? ", " : "", (long long)dims[i]);
  snprintf(shape + used, 256 - used, rank == 1 ? ",)" : ")");
}

/* An array as the manifest describes it: name, dtype, shape; its tensor is allocated. */
static array make_array(TVMFFIAny entry) {
  array a = {.name = text(item(entry, "name")), .dtype = text(item(entry, "dtype")), .count = 1};
  describe_dtype(&a);
  TVMFFIAny dims[8], shape = item(entry, "shape");
  int64_t rank = length_of(shape);
  if (rank > 8) fail("the manifest: %s has %d dimensions", a.name, (int)rank);
  a.rank = (int)rank;
  for (int64_t i = 0; i < rank; i++) {
    dims[i] = element(shape, i);
    if (dims[i].type_index != kTVMFFIInt || dims[i].v_int64 < 0 || dims[i].v_int64 > INT32_MAX) fail("%s: its shape", a.name);
    if (__builtin_mul_overflow(a.count, (size_t)dims[i].v_int64, &a.count) || a.count > SIZE_MAX / 16) fail("%s: its shape", a.name);
    a.dims[i] = dims[i].v_int64;
  }
  write_shape(a.shape, a.dims, a.rank);
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

/* own: what the manifest has for the program of one of several sizes, folder: where its members are; none and "" for that
 * of the smallest, and for the only one. */
typedef struct {
  const char* path;
  bytes file, golden, parameters;
  TVMFFIAny manifest, own;
  char folder[16];
  array inputs[MOST_TENSORS], outputs[MOST_TENSORS];
  int input_count, output_count;
} bundle;

/* "lib.so", or "4/lib.so" of those that each size has. */
static int is_known(const uint8_t* name, size_t length) {
  static const char* const known[] = {"lib.so", "golden.npz", "oracle.json", "manifest.json", "params.bin", "calibration.json"};
  size_t digits = 0, count = sizeof known / sizeof *known;
  while (digits < length && digits < 10 && name[digits] >= '0' && name[digits] <= '9') digits++;
  if (digits > 0 && digits < 10 && digits < length && name[0] != '0' && name[digits] == '/')
    name += digits + 1, length -= digits + 1, count = 3;
  for (size_t i = 0; i < count; i++)
    if (strlen(known[i]) == length && memcmp(known[i], name, length) == 0) return 1;
  return 0;
}

static bytes member(const bundle* b, const char* folder, const char* base) {
  char name[32];
  snprintf(name, sizeof name, "%s%s", folder, base);
  TVMFFIAny entry = item(item(b->manifest, "members"), name);
  size_t size = number(entry, "size");
  bytes data = zip_member(b->file, name, size, b->path);
  char sum[65];
  sha256_hex(data, sum);
  if (data.size != size || strcmp(sum, text(item(entry, "sha256"))) != 0)
    fail("bundle %s: %s: expected another sha256; it was changed after it was made: copy or compile it again", b->path, name);
  return data;
}

/* What the manifest says of the program in hand. */
static TVMFFIAny entry_of(const bundle* b, const char* key) {
  return item(b->own.type_index != kTVMFFINone && has(b->own, key) ? b->own : b->manifest, key);
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
  for (size_t place = 0; (record = next_record(b->file, &place, path)) != NULL;)
    if (!is_known(record + 46, little(record + 28, 2))) fail("bundle %s: an unknown member; do not use this file", path);
  bytes json = zip_member(b->file, "manifest.json", MANIFEST_LIMIT, path);
  TVMFFIByteArray said = {(const char*)json.data, json.size};
  TVMFFIAny source = {0};
  if (TVMFFIStringFromByteArray(&said, &source) != 0) tvm_failed("manifest.json");
  b->manifest = call_global("ffi.json.Parse", 1, &source, "manifest.json");
  if (number(b->manifest, "schema") != SCHEMA) fail("bundle %s: expected schema %d", path, SCHEMA);
  check_processor(b);
}

/* Take a program in hand: `own` and `folder` of one of several sizes, none and "" of the smallest or only one. */
static void take_program(bundle* b, TVMFFIAny own, const char* folder) {
  for (int i = 0; i < b->input_count; i++) TVMFFIObjectDecRef(b->inputs[i].tensor.v_obj);
  for (int i = 0; i < b->output_count; i++) TVMFFIObjectDecRef(b->outputs[i].tensor.v_obj);
  b->own = own;
  snprintf(b->folder, sizeof b->folder, "%s", folder);
  TVMFFIAny signature = entry_of(b, "signature");
  b->input_count = describe(item(signature, "inputs"), b->inputs);
  b->output_count = describe(item(signature, "outputs"), b->outputs);
  b->golden = member(b, folder, "golden.npz");
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
  bytes code = member(b, b->folder, "lib.so"); /* checked before there is a folder to leave */
  const char* base = getenv("TMPDIR");
  char folder[1024], path[1040];
  snprintf(folder, sizeof folder, "%s/tvmq-runner-XXXXXX", base ? base : "/tmp");
  if (mkdtemp(folder) == NULL) fail("cannot make the folder %s: set TMPDIR to another", folder);
  snprintf(path, sizeof path, "%s/lib.so", folder);
  write_file(path, code, (bytes){0});
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
