/* One client's session on a board: TVM's RPC in a process and a folder of its own. */
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/time.h>

#include "board_condition.h"
#include "board_count.h"

static char session_folder[1024];

/* ---- What TVM's runtime and its client expect of a server: where files live, how they come, how a library is loaded ---- */

static TVMFFIByteArray bytes_of(const char* text) { return (TVMFFIByteArray){text, strlen(text)}; }

/* The text or the bytes of an argument, of whichever kind TVM passes; NULL data where it is neither. */
static TVMFFIByteArray text_of(const TVMFFIAny* value) {
  switch (value->type_index) {
    case kTVMFFIRawStr:
      return bytes_of(value->v_c_str);
    case kTVMFFIByteArrayPtr:
      return *(const TVMFFIByteArray*)value->v_ptr;
    case kTVMFFISmallStr:
    case kTVMFFISmallBytes:
      return (TVMFFIByteArray){value->v_bytes, value->small_str_len};
    case kTVMFFIStr:
    case kTVMFFIBytes: /* an object header, then the byte array */
      return *(const TVMFFIByteArray*)(value->v_obj + 1);
    default:
      return (TVMFFIByteArray){NULL, 0};
  }
}

static int path_in_session(const TVMFFIAny* args, int32_t num_args, char* path, size_t size) {
  TVMFFIByteArray name = num_args > 0 ? text_of(args) : (TVMFFIByteArray){NULL, 0};
  if (name.data == NULL) {
    TVMFFIErrorSetRaisedFromCStr("TypeError", "expected a file name");
    return -1;
  }
  if ((size_t)snprintf(path, size, "%s/%.*s", session_folder, (int)name.size, name.data) >= size) {
    TVMFFIErrorSetRaisedFromCStr("ValueError", "the file name is too long");
    return -1;
  }
  return 0;
}

static int workpath(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  (void)self;
  char path[4096];
  if (path_in_session(args, num_args, path, sizeof path) != 0) return -1;
  TVMFFIByteArray bytes = bytes_of(path);
  return TVMFFIStringFromByteArray(&bytes, result);
}

/* TVM's own does not look whether the disk took it all. */
static int upload(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  (void)self, (void)result;
  char path[4096], why[4200];
  if (path_in_session(args, num_args, path, sizeof path) != 0) return -1;
  TVMFFIByteArray data = num_args == 2 ? text_of(args + 1) : (TVMFFIByteArray){NULL, 0};
  FILE* file = fopen(path, "wb");
  int written = file != NULL && fwrite(data.data, 1, data.size, file) == data.size;
  if (file != NULL && fclose(file) != 0) written = 0;
  if (written) return 0;
  snprintf(why, sizeof why, "cannot write %s: %s", path, strerror(errno));
  TVMFFIErrorSetRaisedFromCStr("OSError", why);
  return -1;
}

static TVMFFIObjectHandle global_function(const char* name) {
  TVMFFIByteArray bytes = bytes_of(name);
  TVMFFIObjectHandle function = NULL;
  return TVMFFIFunctionGetGlobal(&bytes, &function) == 0 ? function : NULL;
}

static int load_module(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  (void)self;
  char path[4096];
  if (path_in_session(args, num_args, path, sizeof path) != 0) return -1;
  TVMFFIObjectHandle load = global_function("ffi.ModuleLoadFromFile");
  if (load == NULL) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "this TVM runtime has no ffi.ModuleLoadFromFile");
    return -1;
  }
  TVMFFIAny argument = {.type_index = kTVMFFIRawStr, .v_c_str = path};
  int failed = TVMFFIFunctionCall(load, &argument, 1, result);
  /* One reference is never given back: an object whose deleter lies in the library may outlive the client's handle. */
  if (!failed && result->type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectIncRef(result->v_obj);
  return failed;
}

/* ---- Instruction counts, on an emulated board whose qemu has count_plugin.c. ---- */

/* (module, function, arguments...) -> how many instructions the second of two calls of the function takes. */
static int count_call(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  (void)self;
  if (num_args < 2 || text_of(args + 1).data == NULL) {
    TVMFFIErrorSetRaisedFromCStr("TypeError", "expected a module, the name of a function, and its arguments");
    return -1;
  }
  TVMFFIObjectHandle find = global_function("ffi.ModuleGetFunction");
  TVMFFIAny query[3] = {args[0], args[1], {.type_index = kTVMFFIBool, .v_int64 = 1}}, function = {0}, ignored = {0};
  if (find == NULL || TVMFFIFunctionCall(find, query, 3, &function) != 0) return -1;
  int descriptors[2];
  if (function.type_index != kTVMFFIFunction || pipe2(descriptors, O_NONBLOCK) != 0) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "no such function in the module, or no pipe");
    return -1;
  }
  uint64_t start = 0, stop = 0;
  for (int turn = 0; turn < 2; turn++) { /* the first pays for what is done once */
    start = instructions(descriptors);
    if (TVMFFIFunctionCall(function.v_obj, (TVMFFIAny*)args + 2, num_args - 2, &ignored) != 0) return -1;
    stop = instructions(descriptors);
    if (ignored.type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(ignored.v_obj);
  }
  close(descriptors[0]), close(descriptors[1]);
  TVMFFIObjectDecRef(function.v_obj);
  if (start == 0) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "this board does not count instructions");
    return -1;
  }
  *result = (TVMFFIAny){.type_index = kTVMFFIInt, .v_int64 = (int64_t)(stop - start)};
  return 0;
}

/* (patterns...) -> the files that match, for who wants to know the board's condition. */
static int files_call(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  (void)self;
  text_buffer text = {0};
  int whole = append(&text, "", 0);
  for (int32_t i = 0; i < num_args && whole; i++) {
    TVMFFIByteArray pattern = text_of(args + i);
    if (pattern.data != NULL) whole = append_files(&text, pattern.data, pattern.size);
  }
  TVMFFIByteArray bytes = {text.data, text.size};
  int failed = !whole || TVMFFIStringFromByteArray(&bytes, result) != 0;
  free(text.data);
  if (!whole) TVMFFIErrorSetRaisedFromCStr("MemoryError", "no memory for the board's files");
  return failed ? -1 : 0;
}

/* Told by whoever started the emulator: a program cannot tell that it is emulated. */
static int emulated = 0;

static void register_function(const char* name, TVMFFISafeCallType call) {
  TVMFFIByteArray bytes = bytes_of(name);
  TVMFFIObjectHandle function = NULL;
  if (TVMFFIFunctionCreate(NULL, call, NULL, &function) != 0 || TVMFFIFunctionSetGlobal(&bytes, function, 1) != 0)
    fail("cannot register %s", name);
}

/* Serve the client at `connection` until it leaves, or for `seconds` (0: without limit); ends this process, which
 * `parent` made for that. */
static void serve_client(int connection, double seconds, pid_t parent) {
  /* The server may be killed: its session must not survive it. */
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);
  /* Ctrl-C at the terminal is the server's to handle; a full disk is an error and no death. */
  signal(SIGINT, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
  signal(SIGTERM, SIG_DFL);
  signal(SIGHUP, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
  if (seconds > 1e6) seconds = 1e6;
  struct itimerval limit = {.it_value = {(time_t)seconds, (suseconds_t)((seconds - (double)(time_t)seconds) * 1e6)}};
  setitimer(ITIMER_REAL, &limit, NULL);
  if (chdir(session_folder) != 0) _exit(1);
  register_function("tvm.rpc.server.workpath", workpath);
  register_function("tvm.rpc.server.upload", upload);
  register_function("tvm.rpc.server.load_module", load_module);
  register_function("tvmq.board.files", files_call);
  /* Clients know an emulated board by this function: its times mean nothing. */
  if (emulated) register_function("tvmq.board.count", count_call);
  TVMFFIObjectHandle loop = global_function("rpc.ServerLoop");
  if (loop == NULL) fail("this TVM runtime has no rpc.ServerLoop");
  TVMFFIAny argument = {.type_index = kTVMFFIInt, .v_int64 = connection}, result = {0};
  int failed = TVMFFIFunctionCall(loop, &argument, 1, &result);
  fflush(NULL);
  /* Not exit: destructors of TVM's thread pool and of loaded libraries have no order to run in. */
  _exit(failed ? 1 : 0);
}
