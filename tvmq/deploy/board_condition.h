/* In what condition a board is: its files in /proc and /sys, as they are for clients, and in a line for people. */
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Between a file's name and its text, and after that: as tvmq/deploy/condition.py has them. */
enum { UNIT = '\x1f', RECORD = '\x1e', LONGEST_FILE = 4096 };

typedef struct {
  char* data;
  size_t size;
} text_buffer;

static int append(text_buffer* text, const char* data, size_t size) {
  char* more = realloc(text->data, text->size + size + 1);
  if (more == NULL) return 0;
  memcpy(more + text->size, data, size);
  text->data = more;
  text->size += size;
  more[text->size] = '\0';
  return 1;
}

/* The first bytes of a file; -1 where it cannot be read, as those of /sys whose device is gone. */
static ssize_t read_text(const char* path, char text[LONGEST_FILE]) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return -1;
  ssize_t size = read(file, text, LONGEST_FILE - 1);
  close(file);
  if (size >= 0) text[size] = '\0';
  return size;
}

/* Append every file that matches a shell pattern below /. Returns 0 where memory is out. */
static int append_files(text_buffer* text, const char* pattern, size_t length) {
  char path[512], content[LONGEST_FILE], unit = UNIT, record = RECORD;
  if ((size_t)snprintf(path, sizeof path, "/%.*s", (int)length, pattern) >= sizeof path) return 1;
  glob_t found;
  int whole = 1;
  if (glob(path, 0, NULL, &found) != 0) return 1; /* none, and so nothing to free */
  for (size_t i = 0; i < found.gl_pathc && whole; i++) {
    ssize_t size = read_text(found.gl_pathv[i], content);
    if (size < 0) continue;
    const char* name = found.gl_pathv[i] + 1;
    whole = append(text, name, strlen(name)) && append(text, &unit, 1) && append(text, content, (size_t)size) &&
            append(text, &record, 1);
  }
  globfree(&found);
  return whole;
}

/* ---- For people ---- */

/* The least and the most of the numbers in the files that match; returns how many there are. */
static int numbers_in(const char* pattern, long* least, long* most) {
  glob_t found;
  char content[LONGEST_FILE];
  int count = 0;
  *least = LONG_MAX, *most = LONG_MIN;
  if (glob(pattern, 0, NULL, &found) != 0) return 0;
  for (size_t i = 0; i < found.gl_pathc; i++) {
    char* end = content;
    long value = read_text(found.gl_pathv[i], content) > 0 ? strtol(content, &end, 0) : 0;
    if (end == content) continue;
    *least = value < *least ? value : *least, *most = value > *most ? value : *most;
    count++;
  }
  globfree(&found);
  return count;
}

/* The first word of a file, or "unknown". */
static const char* word_in(const char* path, char text[LONGEST_FILE]) {
  if (read_text(path, text) <= 0) return "unknown";
  text[strcspn(text, " \n")] = '\0';
  return text;
}

/* A line on stdout: governor, clocks, heat, throttling, load, processors, as far as the board tells. */
static void print_condition(const char* when) {
  static const char cpus[] = "/sys/devices/system/cpu";
  char governor[LONGEST_FILE], load[LONGEST_FILE], firmware[LONGEST_FILE], present[LONGEST_FILE], path[128];
  long slowest, highest, ignored;
  snprintf(path, sizeof path, "%s/cpu0/cpufreq/scaling_governor", cpus);
  printf("%s: governor %s", when, word_in(path, governor));
  snprintf(path, sizeof path, "%s/cpu[0-9]*/cpufreq/scaling_cur_freq", cpus);
  int clocks = numbers_in(path, &slowest, &ignored);
  snprintf(path, sizeof path, "%s/cpu[0-9]*/cpufreq/cpuinfo_max_freq", cpus);
  if (numbers_in(path, &ignored, &highest) > 0 && clocks > 0)
    printf(", slowest clock %ld of %ld MHz", slowest / 1000, highest / 1000);
  if (numbers_in("/sys/class/thermal/thermal_zone*/temp", &ignored, &highest) > 0)
    printf(", %ld degrees", highest / 1000);
  const char* word = word_in("/sys/devices/platform/soc/soc:firmware/get_throttled", firmware);
  printf(", throttled %s%s", strcmp(word, "unknown") == 0 ? "" : "0x", word);
  snprintf(path, sizeof path, "%s/present", cpus);
  printf(", load %s, processors %s\n", word_in("/proc/loadavg", load), word_in(path, present));
}
