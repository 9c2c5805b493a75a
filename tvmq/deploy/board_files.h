/* What the runner of a board reads and writes: zip archives with SHA-256 sums, and .npy arrays. All input is untrusted:
 * every offset and size is checked, and a fault ends the program with one line. */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef struct {
  const uint8_t* data;
  size_t size;
} bytes;

static void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("tvmq-runner: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  exit(2);
}

static void* allocate(size_t size) {
  /* A cache line, and what any vector load needs. */
  void* memory = NULL;
  if (posix_memalign(&memory, 64, size ? size : 1) != 0) fail("out of memory: %zu bytes", size);
  return memory;
}

static bytes read_file(const char* path) {
  FILE* file = fopen(path, "rb");
  struct stat status;
  if (file == NULL || fstat(fileno(file), &status) != 0 || !S_ISREG(status.st_mode)) fail("cannot read %s", path);
  size_t size = (size_t)status.st_size;
  uint8_t* data = allocate(size);
  if (fread(data, 1, size, file) != size) fail("cannot read %s", path);
  fclose(file);
  return (bytes){data, size};
}

static void write_file(const char* path, bytes first, bytes second) {
  FILE* file = fopen(path, "wb");
  int failed = file == NULL || fwrite(first.data, 1, first.size, file) != first.size ||
               fwrite(second.data, 1, second.size, file) != second.size;
  if (file != NULL && fclose(file) != 0) failed = 1;
  if (failed && file != NULL) unlink(path);
  if (failed) fail("cannot write %s: is the disk full?", path);
}

/* ---- SHA-256, FIPS 180-4 ---- */

static uint32_t turned(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void sha256_block(uint32_t state[8], const uint8_t block[64]) {
  static const uint32_t k[64] = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
      0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
      0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
      0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
      0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
      0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
      0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
  uint32_t w[64], s[8];
  for (int i = 0; i < 16; i++)
    w[i] = (uint32_t)block[4 * i] << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
  for (int i = 16; i < 64; i++) {
    uint32_t a = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ w[i - 15] >> 3;
    uint32_t b = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + a + w[i - 7] + b;
  }
  memcpy(s, state, sizeof s);
  for (int i = 0; i < 64; i++) {
    uint32_t e = turned(s[4], 6) ^ turned(s[4], 11) ^ turned(s[4], 25);
    uint32_t one = s[7] + e + ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
    uint32_t a = turned(s[0], 2) ^ turned(s[0], 13) ^ turned(s[0], 22);
    uint32_t two = a + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
    memmove(s + 1, s, 7 * sizeof s[0]);
    s[4] += one;
    s[0] = one + two;
  }
  for (int i = 0; i < 8; i++) state[i] += s[i];
}

static void sha256(bytes text, uint8_t digest[32]) {
  uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  size_t whole = text.size / 64, rest = text.size % 64;
  for (size_t i = 0; i < whole; i++) sha256_block(state, text.data + 64 * i);
  uint8_t last[128] = {0};
  if (rest != 0) memcpy(last, text.data + 64 * whole, rest);
  last[rest] = 0x80;
  size_t blocks = rest < 56 ? 1 : 2;
  uint64_t bits = (uint64_t)text.size * 8;
  for (int i = 0; i < 8; i++) last[64 * blocks - 1 - i] = (uint8_t)(bits >> 8 * i);
  for (size_t i = 0; i < blocks; i++) sha256_block(state, last + 64 * i);
  for (int i = 0; i < 32; i++) digest[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
}

static void hexadecimal(const uint8_t digest[32], char hex[65]) {
  for (int i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", digest[i]);
}

static void sha256_hex(bytes text, char hex[65]) {
  uint8_t digest[32];
  sha256(text, digest);
  hexadecimal(digest, hex);
}

/* ---- Deflate, RFC 1951 ---- */

typedef struct {
  bytes in;
  size_t place;
  uint32_t bits;
  int count, damaged;
} bit_stream;

static uint32_t take(bit_stream* s, int need) {
  uint64_t value = s->bits;
  while (s->count < need) {
    if (s->place == s->in.size) {
      s->damaged = 1;
      return 0;
    }
    value |= (uint64_t)s->in.data[s->place++] << s->count;
    s->count += 8;
  }
  s->bits = (uint32_t)(value >> need);
  s->count -= need;
  return (uint32_t)(value & ((1ull << need) - 1));
}

enum { LONGEST_CODE = 15, MOST_SYMBOLS = 288 };

typedef struct {
  uint16_t count[LONGEST_CODE + 1], symbol[MOST_SYMBOLS];
} huffman;

/* The code whose lengths are given; says whether they can be those of one. */
static int make_code(huffman* code, const uint8_t* lengths, int symbols) {
  memset(code->count, 0, sizeof code->count);
  for (int i = 0; i < symbols; i++) code->count[lengths[i]]++;
  int left = 1;
  for (int length = 1; length <= LONGEST_CODE; length++) left = 2 * left - code->count[length];
  uint16_t start[LONGEST_CODE + 2] = {0};
  for (int length = 1; length <= LONGEST_CODE; length++) start[length + 1] = start[length] + code->count[length];
  for (int i = 0; i < symbols; i++)
    if (lengths[i] != 0) code->symbol[start[lengths[i]]++] = (uint16_t)i;
  code->count[0] = 0;
  return left >= 0;
}

static int decode(bit_stream* s, const huffman* code) {
  int word = 0, first = 0, index = 0;
  for (int length = 1; length <= LONGEST_CODE; length++) {
    word |= (int)take(s, 1);
    int count = code->count[length];
    if (s->damaged) return -1;
    if (word - first < count) return code->symbol[index + word - first];
    index += count;
    first = (first + count) << 1;
    word <<= 1;
  }
  return -1;
}

static int read_codes(bit_stream* s, huffman* literals, huffman* distances) {
  static const uint8_t order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
  int counts[3] = {(int)take(s, 5) + 257, (int)take(s, 5) + 1, (int)take(s, 4) + 4};
  uint8_t lengths[MOST_SYMBOLS + 32] = {0};
  for (int i = 0; i < counts[2]; i++) lengths[order[i]] = (uint8_t)take(s, 3);
  huffman code;
  if (counts[0] > 286 || !make_code(&code, lengths, 19)) return 0;
  memset(lengths, 0, sizeof lengths);
  for (int i = 0; i < counts[0] + counts[1];) {
    int symbol = decode(s, &code);
    if (symbol < 0) return 0;
    if (symbol < 16) {
      lengths[i++] = (uint8_t)symbol;
      continue;
    }
    if (symbol == 16 && i == 0) return 0;
    uint8_t value = symbol == 16 ? lengths[i - 1] : 0;
    int repeat = symbol == 16 ? 3 + (int)take(s, 2) : symbol == 17 ? 3 + (int)take(s, 3) : 11 + (int)take(s, 7);
    if (i + repeat > counts[0] + counts[1]) return 0;
    while (repeat--) lengths[i++] = value;
  }
  return make_code(literals, lengths, counts[0]) && make_code(distances, lengths + counts[0], counts[1]);
}

static void fixed_codes(huffman* literals, huffman* distances) {
  uint8_t lengths[MOST_SYMBOLS];
  for (int i = 0; i < MOST_SYMBOLS; i++) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
  make_code(literals, lengths, MOST_SYMBOLS);
  memset(lengths, 5, 30);
  make_code(distances, lengths, 30);
}

static int inflate_block(bit_stream* s, const huffman* literals, const huffman* distances, uint8_t* out, size_t* place,
                         size_t size) {
  static const uint16_t length_base[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                           31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
  static const uint8_t length_bits[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
  static const uint16_t distance_base[30] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
                                             193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
  for (;;) {
    int symbol = decode(s, literals);
    if (symbol == 256) return 1;
    if (symbol < 0 || symbol > 285 || *place == size) return 0;
    if (symbol < 256) {
      out[(*place)++] = (uint8_t)symbol;
      continue;
    }
    size_t length = length_base[symbol - 257] + take(s, length_bits[symbol - 257]);
    int kind = decode(s, distances);
    if (kind < 0 || kind > 29) return 0;
    size_t distance = distance_base[kind] + take(s, kind < 2 ? 0 : kind / 2 - 1);
    if (s->damaged || distance > *place || length > size - *place) return 0;
    for (; length > 0; length--, (*place)++) out[*place] = out[*place - distance];
  }
}

/* Exactly `size` bytes of output; says whether there are that many. */
static int inflate(bytes in, uint8_t* out, size_t size) {
  bit_stream s = {.in = in};
  size_t place = 0;
  for (int last = 0; !last;) {
    last = (int)take(&s, 1);
    uint32_t kind = take(&s, 2);
    huffman literals, distances;
    if (s.damaged || kind == 3) return 0;
    if (kind == 0) {
      s.bits = 0, s.count = 0;
      uint32_t length = take(&s, 16), inverse = take(&s, 16);
      if (s.damaged || length != (~inverse & 0xffff) || length > in.size - s.place || length > size - place) return 0;
      memcpy(out + place, in.data + s.place, length);
      s.place += length, place += length;
      continue;
    }
    if (kind == 1) fixed_codes(&literals, &distances);
    if (kind == 2 && !read_codes(&s, &literals, &distances)) return 0;
    if (!inflate_block(&s, &literals, &distances, out, &place, size)) return 0;
  }
  return place == size;
}

/* ---- Zip archives ---- */

static uint32_t little(const uint8_t* data, int size) {
  uint32_t value = 0;
  for (int i = 0; i < size; i++) value |= (uint32_t)data[i] << 8 * i;
  return value;
}

/* A record of the directory of `zip` at `place`, which moves to the next one; NULL at the end. */
static const uint8_t* next_record(bytes zip, size_t* place, const char* where) {
  if (*place == 0) {
    size_t end = zip.size < 22 ? 0 : zip.size - 22;
    while (end > 0 && little(zip.data + end, 4) != 0x06054b50) end--;
    if (end == 0) fail("%s: expected a .tvmq bundle, saw a damaged or truncated file", where);
    *place = little(zip.data + end + 16, 4);
  }
  if (*place > zip.size - 22 || *place == 0) fail("%s: damaged", where);
  const uint8_t* record = zip.data + *place;
  if (little(record, 4) == 0x06054b50) return NULL;
  if (little(record, 4) != 0x02014b50 || zip.size - *place < 46) fail("%s: damaged", where);
  size_t size = 46 + little(record + 28, 2) + little(record + 30, 2) + little(record + 32, 2);
  if (size > zip.size - *place) fail("%s: damaged", where);
  *place += size;
  return record;
}

/* The one member `name`, of at most `limit` bytes. */
static bytes zip_member(bytes zip, const char* name, size_t limit, const char* where) {
  const uint8_t *record, *found = NULL;
  for (size_t place = 0; (record = next_record(zip, &place, where)) != NULL;) {
    size_t length = little(record + 28, 2);
    if (length != strlen(name) || memcmp(record + 46, name, length) != 0) continue;
    if (found != NULL) fail("%s: %s is there twice; do not use this file", where, name);
    found = record;
  }
  if (found == NULL) fail("%s: no %s in it", where, name);
  size_t packed = little(found + 20, 4), size = little(found + 24, 4), local = little(found + 42, 4);
  if (size > limit) fail("%s: %s: expected at most %zu bytes, saw %zu", where, name, limit, size);
  if (local > zip.size || zip.size - local < 30) fail("%s: %s: damaged", where, name);
  size_t start = local + 30 + little(zip.data + local + 26, 2) + little(zip.data + local + 28, 2);
  if (start > zip.size || packed > zip.size - start) fail("%s: %s: damaged", where, name);
  bytes in = {zip.data + start, packed};
  uint32_t method = little(found + 10, 2);
  uint8_t* out = allocate(size);
  int good = method == 0 ? packed == size : method == 8 && inflate(in, out, size);
  if (!good) fail("%s: %s: damaged; copy or compile it again", where, name);
  if (method == 0) memcpy(out, in.data, size);
  return (bytes){out, size};
}

/* ---- .npy arrays ---- */

enum { NPY_HEADER = 65536 };

/* The header of a .npy as text, and where its values begin. */
static size_t npy_header(bytes file, char header[NPY_HEADER], const char* where) {
  int version = file.size >= 12 && memcmp(file.data, "\x93NUMPY", 6) == 0 ? file.data[6] : 0;
  size_t start = version == 1 ? 10 : 12, length = version == 0 ? 0 : little(file.data + 8, version == 1 ? 2 : 4);
  if (version == 0 || version > 3 || length > file.size - start || length >= NPY_HEADER) fail("%s: no .npy file", where);
  memcpy(header, file.data + start, length);
  header[length] = '\0';
  return start + length;
}

/* The extent of a .npy along `axis`; -1 where it has no such axis. */
static int64_t npy_extent(bytes file, int64_t axis, const char* where) {
  static const char key[] = "'shape': (";
  char header[NPY_HEADER], *end;
  npy_header(file, header, where);
  const char* place = strstr(header, key);
  for (place = place == NULL ? "" : place + sizeof key - 1;; axis--, place = end + 1) {
    long long extent = strtoll(place, &end, 10);
    if (end == place || extent < 0) return -1;
    if (axis == 0) return extent;
    if (*end != ',') return -1;
  }
}

/* The values in a .npy; it must hold `size` bytes of the dtype `descr` ("<f4") and the shape "(1, 2)". */
static bytes npy_values(bytes file, const char* descr, const char* shape, size_t size, const char* where) {
  char header[NPY_HEADER], wanted[3][512];
  size_t start = npy_header(file, header, where);
  snprintf(wanted[0], sizeof wanted[0], "'descr': '%s'", descr);
  snprintf(wanted[1], sizeof wanted[1], "'fortran_order': False");
  snprintf(wanted[2], sizeof wanted[2], "'shape': %s", shape);
  for (int i = 0; i < 3; i++)
    if (strstr(header, wanted[i]) == NULL) fail("%s: expected %s, saw %.*s", where, wanted[i], (int)strcspn(header, "}\n"), header);
  if (file.size - start != size) fail("%s: expected %zu bytes of values", where, size);
  return (bytes){file.data + start, size};
}

static void write_npy(const char* path, const char* descr, const char* shape, bytes values) {
  char head[640] = "\x93NUMPY\x01";
  int length = snprintf(head + 10, sizeof head - 10, "{'descr': '%s', 'fortran_order': False, 'shape': %s, }", descr, shape);
  int padded = (10 + length + 1 + 63) / 64 * 64;
  memset(head + 10 + length, ' ', (size_t)(padded - 10 - length));
  head[padded - 1] = '\n';
  head[7] = 0;
  head[8] = (char)((padded - 10) & 255), head[9] = (char)((padded - 10) >> 8);
  write_file(path, (bytes){(uint8_t*)head, (size_t)padded}, values);
}
