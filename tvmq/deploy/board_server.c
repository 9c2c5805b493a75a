/* A TVM RPC server for a board that has TVM's runtime libraries and nothing else: no Python, no compiler.
 *
 *     tvmq-board-server ADDRESS PORT [--until-stdin-closes]
 *
 * Speaks the protocol of tvm.rpc.Server (tvm/rpc/server.py, protocol in its docstring) without tracker or proxy. Sessions
 * are served one after the other, so that a measurement has the board for itself; each in a process and a folder of its
 * own, so that a crash of compiled code ends the session and not the server. PORT 0 takes any free port. The one line
 * "listening ADDRESS PORT" on stdout says that clients may connect.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <tvm/ffi/c_api.h>

/* tvm/rpc/base.py: RPC_MAGIC, and one of the codes that may answer it. */
enum { RPC_MAGIC = 0xFF271, RPC_CODE_MISMATCH = RPC_MAGIC + 2 };
/* A key is a device name and a few options; a longer one is no TVM client. */
enum { MAX_KEY = 1023 };
/* How long a client may take to say its key; the same for each read. */
enum { HANDSHAKE_SECONDS = 20 };
/* How often a waiting server looks whether its session or its parent has ended. */
enum { POLL_MS = 50 };

static char session_folder[1024];

static void die(const char* what) {
  perror(what);
  exit(1);
}

/* ---- The two functions that TVM's runtime expects of a server: where files live, and how a library is loaded. ---- */

static TVMFFIByteArray bytes_of(const char* text) { return (TVMFFIByteArray){text, strlen(text)}; }

/* The text of a string argument, of whichever of the three kinds TVM passes; NULL data where it is no string. */
static TVMFFIByteArray text_of(const TVMFFIAny* value) {
  switch (value->type_index) {
    case kTVMFFIRawStr:
      return bytes_of(value->v_c_str);
    case kTVMFFISmallStr:
      return (TVMFFIByteArray){value->v_bytes, value->small_str_len};
    case kTVMFFIStr: /* an object header, then the byte array */
      return *(const TVMFFIByteArray*)(value->v_obj + 1);
    default:
      return (TVMFFIByteArray){NULL, 0};
  }
}

static int path_in_session(const TVMFFIAny* args, int32_t num_args, char* path, size_t size) {
  TVMFFIByteArray name = num_args == 1 ? text_of(args) : (TVMFFIByteArray){NULL, 0};
  if (name.data == NULL) {
    TVMFFIErrorSetRaisedFromCStr("TypeError", "expected one file name");
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

enum { MARK = 0x7471 }; /* the same in count_plugin.c */

/* Instructions that this process has run so far; 0 where nobody counts them. */
static uint64_t instructions(const int descriptors[2]) {
  uint64_t count = 0;
  syscall(MARK, descriptors[1]);
  return read(descriptors[0], &count, sizeof count) == sizeof count ? count : 0;
}

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

static void register_function(const char* name, TVMFFISafeCallType call) {
  TVMFFIByteArray bytes = bytes_of(name);
  TVMFFIObjectHandle function = NULL;
  if (TVMFFIFunctionCreate(NULL, call, NULL, &function) != 0 || TVMFFIFunctionSetGlobal(&bytes, function, 1) != 0) {
    fprintf(stderr, "cannot register %s\n", name);
    exit(1);
  }
}

/* ---- One session: handshake, a process, a folder. ---- */

static int receive(int connection, void* data, size_t size) {
  return recv(connection, data, size, MSG_WAITALL) == (ssize_t)size ? 0 : -1;
}

static int send_all(int connection, const void* data, size_t size) {
  return send(connection, data, size, MSG_NOSIGNAL) == (ssize_t)size ? 0 : -1;
}

/* The client's key, "client:NAME [-timeout=SECONDS]"; any NAME is served, for there is one board here. */
static int handshake(int connection, char key[MAX_KEY + 1]) {
  struct timeval patience = {HANDSHAKE_SECONDS, 0}, forever = {0, 0};
  setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  int32_t magic = 0, length = 0;
  if (receive(connection, &magic, 4) != 0 || magic != RPC_MAGIC) return -1;
  if (receive(connection, &length, 4) != 0 || length < 0 || length > MAX_KEY) return -1;
  if (receive(connection, key, (size_t)length) != 0) return -1;
  key[length] = '\0';
  setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof forever);

  int32_t code = strncmp(key, "client:", 7) == 0 ? RPC_MAGIC : RPC_CODE_MISMATCH;
  if (send_all(connection, &code, 4) != 0 || code != RPC_MAGIC) return -1;
  static const char name[] = "server:tvmq-board";
  int32_t name_length = sizeof name - 1;
  return send_all(connection, &name_length, 4) != 0 ? -1 : send_all(connection, name, sizeof name - 1);
}

static void serve(int connection) {
  /* The server may be killed: its session must not survive it. */
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  char key[MAX_KEY + 1];
  if (handshake(connection, key) != 0) _exit(0);
  const char* timeout = strstr(key, "-timeout=");
  if (timeout != NULL) alarm((unsigned)(atof(timeout + strlen("-timeout=")) + 0.999));
  if (chdir(session_folder) != 0) die("chdir");

  register_function("tvm.rpc.server.workpath", workpath);
  register_function("tvm.rpc.server.load_module", load_module);
  register_function("tvmq.board.count", count_call);
  TVMFFIObjectHandle loop = global_function("rpc.ServerLoop");
  if (loop == NULL) {
    fprintf(stderr, "this TVM runtime has no rpc.ServerLoop\n");
    _exit(1);
  }
  TVMFFIAny argument = {.type_index = kTVMFFIInt, .v_int64 = connection}, result = {0};
  int failed = TVMFFIFunctionCall(loop, &argument, 1, &result);
  fflush(NULL);
  /* Not exit: destructors of TVM's thread pool and of loaded libraries have no order to run in. */
  _exit(failed ? 1 : 0);
}

static int remove_entry(const char* path, const struct stat* status, int kind, struct FTW* place) {
  (void)status, (void)kind, (void)place;
  return remove(path);
}

static void make_session_folder(void) {
  const char* base = getenv("TMPDIR");
  int length = snprintf(session_folder, sizeof session_folder, "%s/tvmq-session-XXXXXX", base ? base : "/tmp");
  if ((size_t)length >= sizeof session_folder || mkdtemp(session_folder) == NULL) die("cannot make a session folder");
}

/* ---- The server. ---- */

static int listen_on(const char* address, int port) {
  struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  if (inet_pton(AF_INET, address, &where.sin_addr) != 1) {
    fprintf(stderr, "%s is no IPv4 address\n", address);
    exit(2);
  }
  int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), yes = 1;
  if (listener < 0) die("socket");
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  if (bind(listener, (struct sockaddr*)&where, sizeof where) != 0) die("bind");
  if (listen(listener, 16) != 0) die("listen");
  socklen_t size = sizeof where;
  getsockname(listener, (struct sockaddr*)&where, &size);
  printf("listening %s %d\n", address, ntohs(where.sin_port));
  fflush(stdout);
  return listener;
}

/* Ends the server when nobody holds the other end of its stdin any more. */
static void wait_a_moment(int listener, int watch_stdin) {
  struct pollfd waits[2] = {{.fd = listener, .events = POLLIN}, {.fd = watch_stdin ? STDIN_FILENO : -1, .events = POLLIN}};
  if (poll(waits, 2, POLL_MS) < 0 && errno != EINTR) die("poll");
  char ignored[64];
  if (waits[1].revents != 0 && read(STDIN_FILENO, ignored, sizeof ignored) <= 0) exit(0);
}

static int accept_one(int listener, int watch_stdin) {
  for (;;) {
    wait_a_moment(listener, watch_stdin);
    int connection = accept(listener, NULL, NULL);
    if (connection >= 0) return connection;
    if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) die("accept");
  }
}

static void wait_for(pid_t session, int watch_stdin) {
  int status = 0;
  while (waitpid(session, &status, WNOHANG) == 0) wait_a_moment(-1, watch_stdin);
  if (WIFSIGNALED(status)) fprintf(stderr, "the session was ended by signal %d\n", WTERMSIG(status));
}

int main(int argc, char** argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: tvmq-board-server ADDRESS PORT [--until-stdin-closes]\n");
    return 2;
  }
  int watch_stdin = argc > 3 && strcmp(argv[3], "--until-stdin-closes") == 0;
  int listener = listen_on(argv[1], atoi(argv[2]));
  for (;;) {
    int connection = accept_one(listener, watch_stdin);
    make_session_folder();
    pid_t session = fork();
    if (session < 0) die("fork");
    if (session == 0) {
      close(listener);
      serve(connection);
    }
    close(connection);
    wait_for(session, watch_stdin);
    nftw(session_folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
  }
}
