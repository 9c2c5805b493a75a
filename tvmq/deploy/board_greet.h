/* Who may speak TVM's RPC to a board: the server's side of the protocol that tvmq/deploy/handshake.py describes. Nothing
 * is sent or received here: `answer` is told what a client said. */
#include <ctype.h>
#include <sys/random.h>

/* tvm/rpc/base.py: RPC_MAGIC, and the code for a key that no server has. */
enum { TVM_MAGIC = 0xFF271, TVM_MISMATCH = TVM_MAGIC + 2 };
enum { NONCE = 32, PROOF = 32 };
/* "client:" and a ticket. A key is a device name and a few options; a longer one is no TVM client. */
enum { TICKET_KEY = 7 + 2 * PROOF, LONGEST_KEY = 1023, LONGEST_WORD = 127 };
/* How long there may be between the answer to a challenge and the session, and how many tickets are open at a time. */
enum { TICKET_MS = 10000, MOST_TICKETS = 64 };

static const char NO_CLIENT[] = "no client of tvmq or TVM";

typedef struct {
  char key[2 * PROOF + 1];
  int64_t end; /* milliseconds; one that has passed leaves the place free */
} ticket;

typedef struct {
  bytes secret;    /* without data it lets everybody in */
  const char* key; /* what a tracker told its client to say; NULL without one */
  ticket tickets[MOST_TICKETS];
} gate;

typedef enum { MAGIC, CHALLENGE, ANSWER, LENGTH, KEY } stage;

typedef struct {
  stage at;
  size_t wanted, got;
  uint8_t said[LONGEST_KEY + 1], client[NONCE], server[NONCE];
  uint8_t reply[PROOF]; /* to be sent, whatever the verdict */
  size_t reply_size;
  const char* refused; /* why */
  double seconds;      /* that the session may last; 0: without limit */
} greeting;

typedef enum { GOES_ON, PROVEN, IN, REFUSED } verdict;

static greeting first_words(void) { return (greeting){.at = MAGIC, .wanted = 4}; }

static void little_bytes(uint32_t value, uint8_t data[4]) {
  for (int i = 0; i < 4; i++) data[i] = (uint8_t)(value >> 8 * i);
}

/* HMAC-SHA256, RFC 2104, of role, server's and client's nonce, and the tracker's key. */
static void prove(const gate* door, const char* role, const greeting* g, uint8_t mac[PROOF]) {
  bytes secret = door->secret;
  const char* word = door->key == NULL ? "" : door->key;
  uint8_t key[64] = {0}, inner[64 + 8 + 2 * NONCE + LONGEST_WORD], outer[64 + PROOF];
  if (secret.size > sizeof key)
    sha256(secret, key);
  else
    memcpy(key, secret.data, secret.size);
  size_t length = strlen(role), size = 64 + length + 2 * NONCE + strlen(word);
  for (int i = 0; i < 64; i++) inner[i] = key[i] ^ 0x36, outer[i] = key[i] ^ 0x5c;
  memcpy(inner + 64, role, length);
  memcpy(inner + 64 + length, g->server, NONCE);
  memcpy(inner + 64 + length + NONCE, g->client, NONCE);
  memcpy(inner + 64 + length + 2 * NONCE, word, strlen(word));
  sha256((bytes){inner, size}, outer + 64);
  sha256((bytes){outer, sizeof outer}, mac);
}

/* Takes as long wherever the first difference is. */
static int are_equal(const void* one, const void* two, size_t size) {
  const volatile uint8_t *a = one, *b = two;
  uint8_t difference = 0;
  for (size_t i = 0; i < size; i++) difference |= a[i] ^ b[i];
  return difference == 0;
}

static verdict expect(greeting* g, stage at, size_t wanted) {
  g->at = at, g->wanted = wanted, g->got = 0;
  return GOES_ON;
}

static verdict refuse(greeting* g, const char* why) {
  g->refused = why;
  return REFUSED;
}

/* As `refuse`; TVM's client then says that no server has its key. */
static verdict mismatch(greeting* g, const char* why) {
  little_bytes(TVM_MISMATCH, g->reply);
  g->reply_size = 4;
  return refuse(g, why);
}

static verdict challenge(greeting* g) {
  memcpy(g->client, g->said, NONCE);
  if (getrandom(g->server, NONCE, 0) != NONCE) return refuse(g, "no random numbers here");
  memcpy(g->reply, g->server, NONCE);
  g->reply_size = NONCE;
  return expect(g, ANSWER, PROOF);
}

static verdict check_answer(gate* door, greeting* g, int64_t now) {
  uint8_t mac[PROOF];
  prove(door, "client", g, mac);
  if (!are_equal(mac, g->said, PROOF)) return refuse(g, "a wrong secret");
  ticket* place = door->tickets;
  while (place < door->tickets + MOST_TICKETS && place->end > now) place++;
  if (place == door->tickets + MOST_TICKETS) return refuse(g, "too many clients at once");
  prove(door, "ticket", g, mac);
  hexadecimal(mac, place->key);
  place->end = now + TICKET_MS;
  prove(door, "server", g, g->reply);
  g->reply_size = PROOF;
  return PROVEN;
}

/* Whether `key` is an open ticket, which it is no more then. */
static int redeem(gate* door, const char* key, int64_t now) {
  int found = 0;
  for (ticket* t = door->tickets; t < door->tickets + MOST_TICKETS; t++) {
    if (t->end <= now || !are_equal(t->key, key, 2 * PROOF)) continue;
    t->end = 0;
    found = 1;
  }
  return found;
}

/* A TVM client's "-timeout=SECONDS" among the words of its key; 0 where there is none. */
static double timeout_in(const char* words) {
  static const char name[] = " -timeout=";
  const char* found = strstr(words, name);
  return found != NULL && isdigit((unsigned char)found[sizeof name - 1]) ? strtod(found + sizeof name - 1, NULL) : 0;
}

/* Whether the client says what the tracker told it, where there is one: else any NAME is served, for there is one board. */
static int knows_word(const gate* door, const char* name) {
  size_t length = strcspn(name, " ");
  return door->key == NULL || (strlen(door->key) == length && are_equal(door->key, name, length));
}

/* The key is "client:NAME OPTION...". */
static verdict check_key(gate* door, greeting* g, int64_t now) {
  g->said[g->wanted] = '\0';
  const char* words = (const char*)g->said;
  if (strlen(words) != g->wanted || strncmp(words, "client:", 7) != 0) return mismatch(g, NO_CLIENT);
  if (door->secret.data != NULL && !redeem(door, words + 7, now)) return mismatch(g, "a wrong ticket");
  if (door->secret.data == NULL && !knows_word(door, words + 7)) return mismatch(g, "another key than the tracker's");
  g->seconds = timeout_in(words);
  return IN;
}

static verdict check_magic(const gate* door, greeting* g) {
  int ours = memcmp(g->said, "tvmq", 4) == 0;
  if (ours && door->secret.data != NULL) return expect(g, CHALLENGE, NONCE);
  if (little(g->said, 4) == TVM_MAGIC) return expect(g, LENGTH, 4);
  return refuse(g, ours ? "a secret, and this board has none" : NO_CLIENT);
}

static verdict check_length(gate* door, greeting* g, int64_t now) {
  size_t length = little(g->said, 4);
  if (door->secret.data != NULL && length != TICKET_KEY) return mismatch(g, "no secret");
  if (length > LONGEST_KEY) return refuse(g, NO_CLIENT);
  expect(g, KEY, length);
  return length == 0 ? check_key(door, g, now) : GOES_ON;
}

/* What becomes of a client that has said the bytes it was waited for. */
static verdict answer(gate* door, greeting* g, int64_t now) {
  g->reply_size = 0;
  switch (g->at) {
    case MAGIC:
      return check_magic(door, g);
    case CHALLENGE:
      return challenge(g);
    case ANSWER:
      return check_answer(door, g, now);
    case LENGTH:
      return check_length(door, g, now);
    default:
      return check_key(door, g, now);
  }
}

/* ---- The secret: as tvmq/deploy/secret.py takes it ---- */

enum { SHORTEST_SECRET = 32, LONGEST_SECRET = 4095 };

/* The one word in `said`, of which there are `size` bytes. */
static bytes one_word(const char* where, char* said, size_t size) {
  while (size > 0 && isspace((unsigned char)said[size - 1])) size--;
  while (size > 0 && isspace((unsigned char)*said)) said++, size--;
  int words = 1;
  for (size_t i = 0; i < size; i++) words += isspace((unsigned char)said[i]) != 0;
  if (size < SHORTEST_SECRET || words != 1)
    fail("secret %s: expected one word of %d bytes or more, saw %zu bytes", where, SHORTEST_SECRET, size);
  return (bytes){(uint8_t*)said, size};
}

/* The secret in the file at `path`; "-": in the first line of stdin; "none": none. */
static bytes read_secret(const char* path) {
  static char said[LONGEST_SECRET + 1];
  if (strcmp(path, "none") == 0) return (bytes){NULL, 0};
  if (strcmp(path, "-") == 0) {
    size_t size = 0;
    while (size < LONGEST_SECRET && read(STDIN_FILENO, said + size, 1) == 1 && said[size] != '\n') size++;
    return one_word("of stdin", said, size);
  }
  FILE* file = fopen(path, "rb");
  struct stat status;
  if (file == NULL || fstat(fileno(file), &status) != 0) fail("secret %s: saw %s", path, strerror(errno));
  if (status.st_uid != geteuid() && status.st_uid != 0) fail("secret %s: expected a file of this user", path);
  if (status.st_mode & 077) fail("secret %s: expected mode 0600, saw %04o", path, status.st_mode & 07777);
  size_t size = fread(said, 1, LONGEST_SECRET, file);
  fclose(file);
  return one_word(path, said, size);
}
