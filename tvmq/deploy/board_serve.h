/* The RPC server of boards without Python:
 *
 *     accept -> greeting (all at once, none waits for another) -> queue -> session (one at a time) -> accept ...
 *
 * Sessions are served one after the other, so that a measurement has the board for itself; each in a process and a folder
 * of its own, so that a crash of compiled code ends the session and not the server. The line "listening ADDRESS PORT" on
 * stdout says that clients may connect; each session and each refusal is a line on stderr. */
#include <arpa/inet.h>
#include <errno.h>
#include <ftw.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "board_greet.h"
#include "board_session.h"
#include "board_tracker.h"

/* How long a client may take to greet: a greeting is a few hundred bytes, this is for a line that loses packets. */
#ifndef GREETING_MS
#define GREETING_MS 5000
#endif
/* Clients that greet or wait for their session; a new one takes the place of the oldest. */
enum { MOST_GUESTS = 32 };

typedef struct {
  int connection, waits; /* waits: it has greeted, and its session comes */
  char peer[64];
  int64_t deadline;
  greeting said;
} guest;

typedef struct {
  pid_t process; /* 0: none */
  int ended;     /* readable when the process is gone */
  int64_t since;
  char peer[64];
} session;

typedef struct {
  int listener, until_stdin_closes, guest_count;
  gate door;
  guest guests[MOST_GUESTS]; /* as they came */
  session running;
  registration tracker;
} server;

static volatile sig_atomic_t stopped = 0;

static void stop(int number) {
  (void)number;
  stopped = 1;
}

static int64_t now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void name_of(const struct sockaddr_storage* address, socklen_t size, char* name, size_t limit, int* port) {
  char host[48] = "?", service[8] = "0";
  getnameinfo((const struct sockaddr*)address, size, host, sizeof host, service, sizeof service, NI_NUMERICHOST | NI_NUMERICSERV);
  *port = atoi(service);
  snprintf(name, limit, "%s:%s", host, service);
}

/* ---- Greetings ---- */

static void forget(server* s, int index) {
  close(s->guests[index].connection);
  s->guest_count--;
  memmove(s->guests + index, s->guests + index + 1, (size_t)(s->guest_count - index) * sizeof *s->guests);
}

static void turn_away(server* s, int index, const char* why) {
  fprintf(stderr, "%s refused: %s\n", s->guests[index].peer, why);
  forget(s, index);
}

/* Of those that still greet the one that came first, else of those that wait. */
static int oldest(const server* s) {
  int index = 0;
  while (index < s->guest_count && s->guests[index].waits) index++;
  return index < s->guest_count ? index : 0;
}

static void admit(server* s) {
  struct sockaddr_storage address;
  socklen_t size = sizeof address;
  int connection = accept4(s->listener, (struct sockaddr*)&address, &size, SOCK_NONBLOCK | SOCK_CLOEXEC), port = 0;
  if (connection < 0) { /* it is gone already, or there are no more descriptors: then others must go first */
    if (errno == EAGAIN || errno == EINTR) return;
    fprintf(stderr, "cannot accept: %s\n", strerror(errno));
    if (s->guest_count > 0) turn_away(s, oldest(s), "too many clients at once");
    return;
  }
  if (s->guest_count == MOST_GUESTS) turn_away(s, oldest(s), "too many clients at once");
  guest* g = &s->guests[s->guest_count++];
  *g = (guest){.connection = connection, .deadline = now_ms() + GREETING_MS, .said = first_words()};
  name_of(&address, size, g->peer, sizeof g->peer, &port);
}

static void reply(server* s, int index, verdict found) {
  guest* g = &s->guests[index];
  ssize_t sent = send(g->connection, g->said.reply, g->said.reply_size, MSG_NOSIGNAL);
  if (found == REFUSED) return turn_away(s, index, g->said.refused);
  if (sent != (ssize_t)g->said.reply_size) return turn_away(s, index, "it left");
  if (found == PROVEN) forget(s, index);
  if (found == IN) {
    g->waits = 1;
    renew(&s->tracker); /* its word is used */
  }
}

/* Take what a guest says; never more than what it was asked for. */
static void hear(server* s, int index) {
  guest* g = &s->guests[index];
  greeting* said = &g->said;
  /* A guest that waits for its session has nothing to say: it has gone, or is no client. */
  size_t limit = g->waits ? 1 : said->wanted - said->got;
  ssize_t got = recv(g->connection, said->said + (g->waits ? 0 : said->got), limit, 0);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (got <= 0) return turn_away(s, index, got == 0 ? "it left" : strerror(errno));
  if (g->waits) return turn_away(s, index, "it spoke before its turn");
  said->got += (size_t)got;
  if (said->got == said->wanted) reply(s, index, answer(&s->door, said, now_ms()));
}

/* ---- Sessions ---- */

static int remove_entry(const char* path, const struct stat* status, int kind, struct FTW* place) {
  (void)status, (void)kind, (void)place;
  return remove(path);
}

static void remove_folder(void) { nftw(session_folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS); }

static int make_folder(void) {
  const char* base = getenv("TMPDIR");
  int length = snprintf(session_folder, sizeof session_folder, "%s/tvmq-session-XXXXXX", base ? base : "/tmp");
  errno = ENAMETOOLONG;
  return (size_t)length < sizeof session_folder && mkdtemp(session_folder) != NULL;
}

/* A client whose machine is off frees the board in a minute. */
static int settle(int connection) {
  static const int options[][3] = {{SOL_SOCKET, SO_KEEPALIVE, 1},
                                   {IPPROTO_TCP, TCP_KEEPIDLE, 30},
                                   {IPPROTO_TCP, TCP_KEEPINTVL, 10},
                                   {IPPROTO_TCP, TCP_KEEPCNT, 3}};
  for (size_t i = 0; i < sizeof options / sizeof *options; i++)
    if (setsockopt(connection, options[i][0], options[i][1], &options[i][2], sizeof(int)) != 0) return 0;
  static const char name[] = "server:tvmq-board";
  uint8_t welcome[8 + sizeof name - 1];
  little_bytes(TVM_MAGIC, welcome);
  little_bytes(sizeof name - 1, welcome + 4);
  memcpy(welcome + 8, name, sizeof name - 1);
  return fcntl(connection, F_SETFL, 0) == 0 &&
         send(connection, welcome, sizeof welcome, MSG_NOSIGNAL) == (ssize_t)sizeof welcome;
}

/* The process of a session; -1 where there can be none. */
static pid_t branch(server* s, const guest* g, int ended[2]) {
  pid_t parent = getpid(), process = fork();
  if (process != 0) return process;
  close(s->listener);
  close(ended[0]);
  leave(&s->tracker);
  for (int i = 0; i < s->guest_count; i++)
    if (&s->guests[i] != g) close(s->guests[i].connection);
  serve_client(g->connection, g->said.seconds, parent);
  return 0;
}

static void begin(server* s, int index) {
  const guest* g = &s->guests[index];
  if (!make_folder()) return turn_away(s, index, strerror(errno));
  int ended[2] = {-1, -1};
  pid_t process = -1;
  if (pipe(ended) == 0 && settle(g->connection)) process = branch(s, g, ended);
  int error = errno;
  close(ended[1]); /* the session holds this end until it ends, however it does */
  if (process < 0) {
    close(ended[0]);
    remove_folder();
    return turn_away(s, index, strerror(error));
  }
  s->running = (session){.process = process, .ended = ended[0], .since = now_ms()};
  memcpy(s->running.peer, g->peer, sizeof g->peer);
  forget(s, index);
}

static void finish(server* s) {
  int status = 0;
  char how[64] = "";
  while (waitpid(s->running.process, &status, 0) < 0 && errno == EINTR) continue;
  close(s->running.ended);
  remove_folder();
  if (WIFSIGNALED(status))
    snprintf(how, sizeof how, ", ended by signal %d", WTERMSIG(status));
  else if (status != 0)
    snprintf(how, sizeof how, ", ended by an error");
  fprintf(stderr, "%s session of %.1f s%s\n", s->running.peer, (double)(now_ms() - s->running.since) / 1e3, how);
  s->running = (session){0};
  renew(&s->tracker);
}

/* ---- The loop ---- */

/* Until there is something to do; signals come here only. */
static int await(server* s, struct pollfd waits[3 + MOST_GUESTS]) {
  int64_t patience = -1, now = now_ms();
  waits[0] = (struct pollfd){.fd = s->listener, .events = POLLIN};
  waits[1] = (struct pollfd){.fd = s->until_stdin_closes ? STDIN_FILENO : -1, .events = POLLIN};
  waits[2] = (struct pollfd){.fd = s->running.process ? s->running.ended : -1, .events = POLLIN};
  if (s->tracker.key != NULL) patience = s->tracker.due > now ? s->tracker.due - now : 0;
  for (int i = 0; i < s->guest_count; i++) {
    waits[3 + i] = (struct pollfd){.fd = s->guests[i].connection, .events = POLLIN};
    int64_t left = s->guests[i].deadline > now ? s->guests[i].deadline - now : 0;
    if (!s->guests[i].waits && (patience < 0 || left < patience)) patience = left;
  }
  struct timespec limit = {patience / 1000, patience % 1000 * 1000000};
  sigset_t none;
  sigemptyset(&none);
  if (ppoll(waits, (nfds_t)(3 + s->guest_count), patience < 0 ? NULL : &limit, &none) >= 0) return 1;
  if (errno != EINTR) fail("poll: %s", strerror(errno));
  return 0;
}

static void work(server* s, const struct pollfd* waits) {
  char ignored[64];
  if (waits[1].revents != 0 && read(STDIN_FILENO, ignored, sizeof ignored) <= 0) stopped = 1;
  /* From the last: one that is forgotten moves those after it. */
  for (int i = s->guest_count - 1; i >= 0; i--)
    if (waits[3 + i].revents != 0) hear(s, i);
  for (int i = s->guest_count - 1; i >= 0; i--) {
    char why[40];
    snprintf(why, sizeof why, "no greeting in %g s", GREETING_MS / 1e3);
    if (!s->guests[i].waits && s->guests[i].deadline <= now_ms()) turn_away(s, i, why);
  }
  if (waits[0].revents != 0) admit(s);
  if (waits[2].revents != 0) finish(s);
  for (int i = 0; i < s->guest_count && s->running.process == 0;)
    if (s->guests[i].waits)
      begin(s, i); /* which forgets it */
    else
      i++;
}

static int is_free(const server* s) {
  int waiting = 0;
  for (int i = 0; i < s->guest_count; i++) waiting += s->guests[i].waits;
  return s->running.process == 0 && waiting == 0;
}

static int listen_on(const char* host, const char* port, int* found) {
  struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM}, *where = NULL;
  if (getaddrinfo(host, port, &hints, &where) != 0) fail("--host %s: expected an address such as 0.0.0.0", host);
  int listener = socket(where->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), yes = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  if (listener < 0 || bind(listener, where->ai_addr, where->ai_addrlen) != 0 || listen(listener, 128) != 0)
    fail("cannot listen on %s:%s: %s", host, port, strerror(errno));
  freeaddrinfo(where);
  struct sockaddr_storage address;
  socklen_t size = sizeof address;
  char name[64];
  getsockname(listener, (struct sockaddr*)&address, &size);
  name_of(&address, size, name, sizeof name, found);
  printf("listening %s %d\n", host, *found);
  fflush(stdout);
  return listener;
}

static void heed_signals(void) {
  sigset_t ours;
  sigemptyset(&ours);
  static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
  for (int i = 0; i < 3; i++) {
    sigaddset(&ours, numbers[i]);
    sigaction(numbers[i], &(struct sigaction){.sa_handler = stop}, NULL);
  }
  sigprocmask(SIG_BLOCK, &ours, NULL);
  /* Who reads our stderr may be gone, and a client too. */
  signal(SIGPIPE, SIG_IGN);
}

static int serve(const char* host, const char* port, const char* secret, registration tracker, int until_stdin_closes) {
  static server s;
  heed_signals();
  s.until_stdin_closes = until_stdin_closes;
  s.door.secret = read_secret(secret);
  s.tracker = tracker;
  s.listener = listen_on(host, port, &s.tracker.board_port);
  struct pollfd waits[3 + MOST_GUESTS];
  while (!stopped) {
    keep(&s.tracker, is_free(&s), now_ms());
    s.door.key = s.tracker.key == NULL ? NULL : s.tracker.own_key;
    if (await(&s, waits)) work(&s, waits);
  }
  leave(&s.tracker);
  if (s.running.process != 0) {
    kill(s.running.process, SIGKILL);
    finish(&s);
  }
  return 0;
}
