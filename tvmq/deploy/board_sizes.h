/* Bundles of several sizes, as `tvmq/dynamic.py` has it: inputs run in the program of the next size, padded with zeros, and
 * outputs are cut. */

enum { MOST_SIZES = 64 };

typedef struct {
  const char* name;
  int axis;
} varying;

/* sizes: ascending, `count` of them; 0 of a bundle without. axes: those that vary, together. */
typedef struct {
  TVMFFIAny entry;
  int64_t sizes[MOST_SIZES];
  varying axes[MOST_TENSORS];
  int count, axis_count, exact;
} dynamic;

static int64_t natural(TVMFFIAny value) {
  if (value.type_index != kTVMFFIInt || value.v_int64 < 0 || value.v_int64 > INT32_MAX) fail("the manifest: dynamic sizes");
  return value.v_int64;
}

static void check_folders(const bundle* b, const dynamic* d) {
  const uint8_t* record;
  for (size_t place = 0; (record = next_record(b->file, &place, b->path)) != NULL;) {
    if (memchr(record + 46, '/', little(record + 28, 2)) == NULL) continue;
    int64_t size = strtoll((const char*)record + 46, NULL, 10);
    int found = 0;
    for (int i = 1; i < d->count; i++) found |= d->sizes[i] == size;
    if (!found) fail("bundle %s: a program of another size than the manifest has; do not use this file", b->path);
  }
}

static dynamic sizes_of(const bundle* b) {
  dynamic d = {0};
  if (has(b->manifest, "dynamic")) d.entry = item(b->manifest, "dynamic");
  if (d.entry.type_index != kTVMFFINone) {
    TVMFFIAny sizes = item(d.entry, "sizes"), axes = item(d.entry, "axes"), exact = item(d.entry, "exact");
    int64_t count = length_of(sizes), axis_count = length_of(axes);
    if (count < 1 || count > MOST_SIZES || axis_count < 1 || axis_count > MOST_TENSORS ||
        length_of(item(d.entry, "programs")) != count - 1 || exact.type_index != kTVMFFIBool)
      fail("the manifest: dynamic sizes");
    d.count = (int)count, d.axis_count = (int)axis_count, d.exact = exact.v_int64 != 0;
    for (int i = 0; i < d.count; i++) {
      d.sizes[i] = natural(element(sizes, i));
      if (d.sizes[i] <= (i ? d.sizes[i - 1] : 0)) fail("the manifest: dynamic sizes");
    }
    for (int i = 0; i < d.axis_count; i++) {
      TVMFFIAny pair = element(axes, i);
      d.axes[i] = (varying){text(element(pair, 0)), (int)natural(element(pair, 1))};
    }
  }
  check_folders(b, &d);
  return d;
}

/* Take the program at `index` in hand; 0 is the smallest, or the only one. */
static void take_size(bundle* b, const dynamic* d, int index) {
  char folder[16] = "";
  if (index > 0) snprintf(folder, sizeof folder, "%d/", (int)d->sizes[index]);
  take_program(b, index > 0 ? element(item(d->entry, "programs"), index - 1) : (TVMFFIAny){0}, folder);
  for (int i = 0; i < d->axis_count; i++) {
    int found = 0;
    for (int k = 0; k < b->input_count; k++)
      found |= strcmp(b->inputs[k].name, d->axes[i].name) == 0 && d->axes[i].axis < b->inputs[k].rank &&
               b->inputs[k].dims[d->axes[i].axis] == d->sizes[index];
    if (!found) fail("the manifest: dynamic sizes: no input %s of size %d", d->axes[i].name, (int)d->sizes[index]);
  }
}

/* Which program takes inputs of `size`. */
static int program_for(const dynamic* d, int64_t size) {
  for (int i = 0; i < d->count; i++)
    if (d->sizes[i] == size || (d->sizes[i] > size && size > 0 && !d->exact)) return i;
  char known[16 * MOST_SIZES] = "";
  size_t used = 0;
  for (int i = 0; i < d->count; i++)
    used += (size_t)snprintf(known + used, sizeof known - used, "%s%d", i ? ", " : "", (int)d->sizes[i]);
  if (!d->exact) snprintf(known, sizeof known, "1 to %d", (int)d->sizes[d->count - 1]);
  fail("input %s: expected %s along axis %d, saw %lld; compile with the sizes that you need: --dynamic", d->axes[0].name, known,
       d->axes[0].axis, (long long)size);
  return 0;
}

/* The bytes of what two arrays have in common, the beginning along each axis, from one to the other. */
static void copy_common(uint8_t* to, const int64_t* to_dims, const uint8_t* from, const int64_t* from_dims, int rank, size_t item_size) {
  size_t to_step = item_size, from_step = item_size;
  for (int i = 1; i < rank; i++) to_step *= (size_t)to_dims[i], from_step *= (size_t)from_dims[i];
  size_t count = rank == 0 ? 1 : (size_t)(to_dims[0] < from_dims[0] ? to_dims[0] : from_dims[0]);
  if (rank < 2) {
    memcpy(to, from, count * item_size);
    return;
  }
  for (size_t i = 0; i < count; i++)
    copy_common(to + i * to_step, to_dims + 1, from + i * from_step, from_dims + 1, rank - 1, item_size);
}

/* `dims` of an input as the caller has it: `size` along the axes that vary. */
static void given_dims(const dynamic* d, const array* a, int64_t size, int64_t dims[8]) {
  memcpy(dims, a->dims, sizeof a->dims);
  for (int i = 0; i < d->axis_count; i++)
    if (strcmp(d->axes[i].name, a->name) == 0) dims[d->axes[i].axis] = size;
}

/* `dims` of output `index` that inputs of `size` give: those of `a`, cut. */
static void cut_dims(const dynamic* d, const array* a, int index, int64_t size, int64_t dims[8]) {
  memcpy(dims, a->dims, sizeof a->dims);
  if (d->count == 0 || d->exact) return;
  TVMFFIAny cuts = item(d->entry, "cuts");
  if (index >= length_of(cuts)) fail("the manifest: dynamic sizes: no cut of output %s", a->name);
  TVMFFIAny cut = element(cuts, index);
  if (cut.type_index == kTVMFFINone) return;
  int64_t axis = natural(item(cut, "axis")), extent = natural(item(cut, "each")) * size;
  if (axis >= a->rank || extent > a->dims[axis]) fail("the manifest: dynamic sizes: the cut of output %s", a->name);
  dims[axis] = extent;
}
