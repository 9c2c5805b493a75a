/* Runs and measures bundles, and serves TVM's RPC, on a board that has TVM's runtime libraries and nothing else: no
 * Python, no compiler.
 *
 *     tvmq-runner run BUNDLE [--input NAME=FILE.npy]... [--output FOLDER] [--threads N]
 *     tvmq-runner bench BUNDLE [--input NAME=FILE.npy]... [--repeat N] [--threads N]
 *     tvmq-runner serve --secret FILE|none|- [--host ADDRESS] [--port N] [--tracker HOST:PORT --key KEY]
 *                       [--until-stdin-closes] [--emulated]
 *
 * Without --input the bundle's example inputs are run, and the outputs compared with the bundle's. Of a bundle of several
 * sizes that is the smallest program, and `bench` measures each; inputs run in that of the next size. The server lets those in
 * who know the secret in FILE (-: the first line of stdin; none: everybody), on the loopback interface and any free port
 * unless told otherwise, and offers the board at TVM's tracker where there is one. Exit codes: 0 done, 1 the outputs differ
 * from those of an exact bundle, 2 bad input.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <time.h>

#include "board_bundle.h"
#include "board_serve.h"
#include "board_sizes.h"

/* files: what `inputs` names, each read once. */
typedef struct {
  const char *path, *output, *inputs[MOST_TENSORS];
  bytes files[MOST_TENSORS];
  int input_count, repeat, threads;
} request;

typedef struct {
  TVMFFIObjectHandle main;
  TVMFFIAny* arguments;
  int count;
} program;

static TVMFFIAny run_once(const program* p) { return call(p->main, p->count, p->arguments, "the run"); }

/* Which --input names a tensor; -1 where none does. */
static int given_for(const request* r, const char* name) {
  for (int i = 0; i < r->input_count; i++) {
    size_t length = strcspn(r->inputs[i], "=");
    if (strlen(name) == length && strncmp(name, r->inputs[i], length) == 0) return i;
  }
  return -1;
}

static const char* path_of(const request* r, int index) { return strchr(r->inputs[index], '=') + 1; }

/* What the inputs have along the axes that vary; 0 where none of those is given. */
static int64_t given_size(const dynamic* d, const request* r) {
  int64_t size = -1;
  int missing = -1;
  for (int i = 0; i < d->axis_count; i++) {
    int index = given_for(r, d->axes[i].name);
    if (index < 0) {
      missing = i;
      continue;
    }
    int64_t seen = npy_extent(r->files[index], d->axes[i].axis, path_of(r, index));
    if (seen < 0) fail("%s: expected an axis %d", path_of(r, index), d->axes[i].axis);
    if (size >= 0 && seen != size)
      fail("input %s: expected %lld along axis %d, as others have, saw %lld", d->axes[i].name, (long long)size, d->axes[i].axis, (long long)seen);
    size = seen;
  }
  if (size < 0) return 0;
  if (missing >= 0) fail("--input: expected %s too: its size varies with that of the others", d->axes[missing].name);
  program_for(d, size);
  return size;
}

/* The inputs of the program in hand: those given, of `size` along the axes that vary where it is not 0, else the examples. */
static void fill_inputs(bundle* b, const dynamic* d, const request* r, int64_t size) {
  int given = 0;
  for (int i = 0; i < b->input_count; i++) {
    array* a = &b->inputs[i];
    int index = given_for(r, a->name);
    if (index < 0) {
      memcpy(a->data, golden(b, "input", i, a).data, a->count * a->item_size);
      continue;
    }
    int64_t dims[8];
    char shape[256];
    given_dims(d, a, size, dims);
    write_shape(shape, dims, a->rank);
    size_t count = 1;
    for (int k = 0; k < a->rank; k++) count *= (size_t)dims[k];
    bytes values = npy_values(r->files[index], a->descr, shape, count * a->item_size, path_of(r, index));
    memset(a->data, 0, a->count * a->item_size);
    copy_common(a->data, a->dims, values.data, dims, a->rank, a->item_size);
    given++;
  }
  if (given != r->input_count) fail("--input: expected each of the bundle's inputs at most once, the first is %s", b->inputs[0].name);
}

/* Have the library's `prepare` make what main takes of the last parameters, which are let go. */
static void decode_parameters(const bundle* b, program* p, TVMFFIAny machine) {
  /* A bundle of an older tvmq has no such. */
  if (!has(b->manifest, "prepared")) return;
  TVMFFIAny prepared = entry_of(b, "prepared");
  int count = (int)number(prepared, "parameters"), made = (int)length_of(item(prepared, "weights"));
  if (made == 0) return;
  if (count < 0 || count > p->count - b->input_count) fail("the manifest: prepared");
  TVMFFIAny* reads = p->arguments + p->count - count;
  TVMFFIAny weights = call(method(machine, "prepare"), count, reads, "prepare");
  for (int i = 0; i < count; i++) TVMFFIObjectDecRef(reads[i].v_obj);
  p->count += made - count;
  TVMFFIAny* arguments = allocate((size_t)p->count * sizeof *arguments);
  memcpy(arguments, p->arguments, (size_t)(p->count - made) * sizeof *arguments);
  for (int i = 0; i < made; i++) arguments[p->count - made + i] = element(weights, i);
  free(p->arguments);
  p->arguments = arguments;
  TVMFFIObjectDecRef(weights.v_obj);
}

static program prepare(bundle* b) {
  if (b->parameters.data == NULL) b->parameters = member(b, "", "params.bin");
  TVMFFIAny entries = entry_of(b, "parameters");
  int64_t count = length_of(entries);
  program p = {.count = b->input_count + (int)count};
  p.arguments = allocate((size_t)p.count * sizeof *p.arguments);
  for (int i = 0; i < b->input_count; i++) p.arguments[i] = b->inputs[i].tensor;
  for (int64_t i = 0; i < count; i++) {
    TVMFFIAny entry = element(entries, i);
    array parameter = make_array(entry);
    fill_parameter(&parameter, entry, b->parameters);
    p.arguments[b->input_count + i] = parameter.tensor;
  }
  TVMFFIAny machine = load(b);
  decode_parameters(b, &p, machine);
  p.main = method(machine, "main");
  return p;
}

/* Let go of the parameters: the next program has its own. */
static void drop_parameters(const bundle* b, const program* p) {
  for (int i = b->input_count; i < p->count; i++) TVMFFIObjectDecRef(p->arguments[i].v_obj);
  free(p->arguments);
}

static TVMFFIAny output_of(const bundle* b, TVMFFIAny result, int index) {
  TVMFFIAny found = result.type_index == kTVMFFITensor ? result : element(result, index);
  DLTensor* tensor = (DLTensor*)((char*)found.v_obj + sizeof(TVMFFIObject));
  size_t count = 1;
  for (int i = 0; i < tensor->ndim; i++) count *= (size_t)tensor->shape[i];
  if (found.type_index != kTVMFFITensor || count != b->outputs[index].count) fail("output %d: another shape", index);
  return found;
}

/* What inputs of `size` give of an output, its shape as text in `shape`. */
static bytes values_of(const bundle* b, const dynamic* d, TVMFFIAny result, int index, int64_t size, char shape[256]) {
  const array* a = &b->outputs[index];
  const DLTensor* tensor = (DLTensor*)((char*)output_of(b, result, index).v_obj + sizeof(TVMFFIObject));
  const uint8_t* values = (uint8_t*)tensor->data + tensor->byte_offset;
  int64_t dims[8];
  cut_dims(d, a, index, size, dims);
  write_shape(shape, dims, a->rank);
  size_t count = 1;
  for (int i = 0; i < a->rank; i++) count *= (size_t)dims[i];
  uint8_t* cut = allocate(count * a->item_size);
  copy_common(cut, dims, values, a->dims, a->rank, a->item_size);
  return (bytes){cut, count * a->item_size};
}

static int run(bundle* b, const dynamic* d, const request* r, int64_t size) {
  program p = prepare(b);
  TVMFFIAny result = run_once(&p);
  int differing = 0, examples = r->input_count == 0;
  if (r->output != NULL && mkdir(r->output, 0777) != 0 && access(r->output, W_OK) != 0) fail("cannot write %s", r->output);
  for (int i = 0; i < b->output_count; i++) {
    const array* a = &b->outputs[i];
    char path[2048], shape[256];
    bytes values = values_of(b, d, result, i, size, shape);
    /* The name is the bundle's, and the file is to be in this folder. */
    if (strchr(a->name, '/') != NULL || a->name[0] == '.' || strlen(a->name) > 200) fail("output %d: its name", i);
    snprintf(path, sizeof path, "%s/%s.npy", r->output ? r->output : "", a->name);
    if (r->output != NULL) write_npy(path, a->descr, shape, values);
    int equal = examples && memcmp(values.data, golden(b, "output", i, a).data, values.size) == 0;
    differing += examples && !equal;
    printf("%s %s %s%s\n", a->name, a->dtype, shape, !examples ? "" : equal ? " as expected" : " differs from the example");
  }
  TVMFFIAny exact = entry_of(b, "exact");
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

static void measure(bundle* b, const request* r, const char* what) {
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
  printf("%s%.3f ms median, %.3f p90, %.3f min (%d repeats, %d threads)\n", what, times[r->repeat / 2],
         times[(r->repeat - 1) * 9 / 10], times[0], r->repeat, r->threads);
  free(times);
  drop_parameters(b, &p);
}

/* The program in hand, or each of several sizes where no input says which. */
static int bench(bundle* b, const dynamic* d, const request* r, int64_t size) {
  print_condition("before");
  if (d->count == 0) measure(b, r, "");
  for (int i = 0; i < d->count; i++) {
    if (size > 0 && i != program_for(d, size)) continue;
    char what[32];
    snprintf(what, sizeof what, "size %d: ", (int)d->sizes[i]);
    take_size(b, d, i);
    fill_inputs(b, d, r, size > 0 ? size : d->sizes[i]);
    measure(b, r, what);
  }
  print_condition("after");
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
  const char *host = "127.0.0.1", *port = "0", *secret = NULL, *tracker = NULL, *key = NULL;
  int until_stdin_closes = 0;
  for (int i = 2; i < argc; i++) {
    const char** value = strcmp(argv[i], "--host") == 0      ? &host
                         : strcmp(argv[i], "--port") == 0    ? &port
                         : strcmp(argv[i], "--secret") == 0  ? &secret
                         : strcmp(argv[i], "--tracker") == 0 ? &tracker
                         : strcmp(argv[i], "--key") == 0     ? &key
                                                             : NULL;
    if (value != NULL && i + 1 < argc)
      *value = argv[++i];
    else if (strcmp(argv[i], "--until-stdin-closes") == 0)
      until_stdin_closes = 1;
    else if (strcmp(argv[i], "--emulated") == 0)
      emulated = 1;
    else
      fail("%s: expected --secret FILE, --host ADDRESS, --port N, --tracker HOST:PORT, --key KEY, --until-stdin-closes or --emulated", argv[i]);
  }
  char* end = NULL;
  long number = strtol(port, &end, 10);
  if (*port == '\0' || *end != '\0' || number < 0 || number > 65535) fail("--port: expected 0 to 65535, saw %s", port);
  if (secret == NULL) fail("serve: expected --secret FILE; --secret none lets everybody in, who may run any code here");
  set_threads(processors(), 0);
  return serve(host, port, secret, at_tracker(tracker, key), until_stdin_closes);
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
  for (int i = 0; i < r.input_count; i++) r.files[i] = read_file(path_of(&r, i));
  static bundle b;
  open_bundle(&b, r.path);
  dynamic d = sizes_of(&b);
  int64_t size = d.count > 0 ? given_size(&d, &r) : 0;
  int index = size > 0 ? program_for(&d, size) : 0;
  take_size(&b, &d, index);
  /* Examples are as large as their program. */
  int64_t own = size > 0 || d.count == 0 ? size : d.sizes[index];
  fill_inputs(&b, &d, &r, own);
  int code = benching ? bench(&b, &d, &r, size) : run(&b, &d, &r, own);
  fflush(NULL);
  /* Not exit: destructors of TVM's thread pool and of loaded libraries have no order to run in. */
  _exit(code);
}
