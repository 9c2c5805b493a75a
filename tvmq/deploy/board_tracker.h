/* A board's place at TVM's tracker, as tvmq/deploy/tracker.py keeps it: `keep` is called every TICK_MS and after `renew`.
 *
 * A greeting of four bytes goes both ways; then each message is its length and JSON. */
#include <ctype.h>
#include <errno.h>
#include <netdb.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/time.h>

/* tvm/rpc/base.py: RPC_TRACKER_MAGIC and TrackerCode. */
enum { TRACKER_MAGIC = 0x2F271, PUT = 3, UPDATE = 5, PENDING = 7 };
/* The board serves nobody while it waits for its tracker; as the tracker's own limit. */
enum { TICK_MS = 2000, TAKEN_TICKS = 3, TRACKER_S = 2, LONGEST_ANSWER = 1 << 20, LONGEST_NAME = 64 };

typedef struct {
  char host[256];
  const char *port, *key; /* without a key there is no tracker */
  char own_key[LONGEST_NAME + 18];
  int board_port, connection, offered, taken_ticks;
  int64_t due;
} registration;

/* A new key of its own: the old one has been used. It is offered when `keep` finds the board free. */
static void renew(registration* r) {
  uint8_t noise[8];
  if (r->key == NULL) return;
  if (getrandom(noise, sizeof noise, 0) != sizeof noise) fail("no random numbers here");
  size_t used = (size_t)snprintf(r->own_key, sizeof r->own_key, "%s:", r->key);
  for (int i = 0; i < 8; i++) used += (size_t)snprintf(r->own_key + used, sizeof r->own_key - used, "%02x", noise[i]);
  r->offered = 0;
  r->due = 0;
}

/* The options --tracker HOST:PORT and --key KEY; both NULL: no tracker. */
static registration at_tracker(const char* place, const char* key) {
  registration r = {.connection = -1};
  if (place == NULL && key == NULL) return r;
  if (place == NULL || key == NULL) fail("--tracker HOST:PORT and --key KEY: expected both or none");
  const char* colon = strrchr(place, ':');
  size_t host = colon == NULL ? 0 : (size_t)(colon - place);
  if (host == 0 || host >= sizeof r.host || atoi(colon + 1) < 1 || atoi(colon + 1) > 65535)
    fail("--tracker: expected HOST:PORT with a port from 1 to 65535, saw %s", place);
  /* It is written into JSON as it is. */
  size_t length = strlen(key);
  for (size_t i = 0; i < length; i++)
    if (!isalnum((unsigned char)key[i]) && strchr("._-", key[i]) == NULL) length = 0;
  if (length == 0 || length > LONGEST_NAME) fail("--key: expected letters, digits, dots and dashes, saw %s", key);
  memcpy(r.host, place, host);
  r.port = colon + 1;
  r.key = key;
  renew(&r);
  return r;
}

/* ---- Messages: 0 where the tracker does not take part, with errno ---- */

static int send_all(int connection, const void* data, size_t size) {
  return send(connection, data, size, MSG_NOSIGNAL) == (ssize_t)size;
}

static int receive_all(int connection, void* data, size_t size) {
  ssize_t got = recv(connection, data, size, MSG_WAITALL);
  if (got >= 0 && got != (ssize_t)size) errno = ECONNRESET;
  return got == (ssize_t)size;
}

/* Whether the answer to a message came; holds: a text to look for in it, whose presence goes to *found. */
static int ask(const registration* r, const char* message, const char* holds, int* found) {
  uint8_t length[4];
  little_bytes((uint32_t)strlen(message), length);
  if (!send_all(r->connection, length, 4) || !send_all(r->connection, message, strlen(message))) return 0;
  if (!receive_all(r->connection, length, 4)) return 0;
  size_t size = little(length, 4);
  errno = EPROTO;
  if (size == 0 || size > LONGEST_ANSWER) return 0;
  char* answer = allocate(size + 1);
  int came = receive_all(r->connection, answer, size);
  answer[came ? size : 0] = '\0';
  if (found != NULL) *found = strstr(answer, holds) != NULL;
  free(answer);
  return came;
}

static int reach(registration* r) {
  struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *where = NULL;
  struct timeval patience = {.tv_sec = TRACKER_S};
  errno = EHOSTUNREACH;
  if (getaddrinfo(r->host, r->port, &hints, &where) != 0) return 0;
  r->connection = socket(where->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  int reached = r->connection >= 0 &&
                setsockopt(r->connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) == 0 &&
                setsockopt(r->connection, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) == 0 &&
                connect(r->connection, where->ai_addr, where->ai_addrlen) == 0;
  freeaddrinfo(where);
  uint8_t magic[4], said[4];
  little_bytes(TRACKER_MAGIC, magic);
  if (!reached || !send_all(r->connection, magic, 4) || !receive_all(r->connection, said, 4)) return 0;
  errno = EPROTO;
  if (memcmp(magic, said, 4) != 0) return 0;
  char message[LONGEST_NAME + 80];
  snprintf(message, sizeof message, "[%d, {\"key\": \"server:%s\", \"addr\": [null, %d]}]", UPDATE, r->key, r->board_port);
  return ask(r, message, NULL, NULL);
}

/* Take the offer back where a client took it and did not come. */
static int look(registration* r, int64_t now) {
  char message[16];
  int waits = 0;
  snprintf(message, sizeof message, "[%d]", PENDING);
  if (!ask(r, message, r->own_key, &waits)) return 0;
  r->taken_ticks = waits ? 0 : r->taken_ticks + 1;
  if (r->taken_ticks >= TAKEN_TICKS) {
    renew(r);
    r->due = now + TICK_MS;
  }
  return 1;
}

static int offer(registration* r) {
  char message[2 * LONGEST_NAME + 80];
  snprintf(message, sizeof message, "[%d, \"%s\", [%d, \"%s\"], null]", PUT, r->key, r->board_port, r->own_key);
  if (!ask(r, message, NULL, NULL)) return 0;
  r->offered = 1;
  r->taken_ticks = 0;
  return 1;
}

static void leave(registration* r) {
  if (r->connection >= 0) close(r->connection);
  r->connection = -1;
  r->offered = 0;
}

/* Connect where that is lost, and offer the board where it is `free`. */
static void keep(registration* r, int free_now, int64_t now) {
  if (r->key == NULL || r->due > now) return;
  r->due = now + TICK_MS;
  int kept = (r->connection >= 0 || reach(r)) && (!free_now || !r->offered || look(r, now));
  if (kept && free_now && !r->offered) kept = offer(r);
  if (kept) return;
  fprintf(stderr, "no tracker at %s:%s: %s; trying on\n", r->host, r->port, strerror(errno));
  leave(r);
}
