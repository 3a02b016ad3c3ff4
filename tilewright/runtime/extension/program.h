/* Programs: kernels to start, the bytes of their arguments, and what in them belongs to a call. */
#pragma once
#include <math.h>
#include "host.h"

#define MOST_VALUES 48        /* arguments of a call and new tensors */
#define MOST_IMAGE 8192       /* bytes of a kernel's arguments */
#define MOST_PARAMETERS 256
#define MAP_BYTES 128
#define MAP_ALIGN 64
#define MOST_MAPS 256         /* kept for one argument: layers have their own weights, and a slot is not always free */

enum { ADDRESS, INT32, INT64, FLOAT32, FLOAT64, INT_AS_FLOAT32, INT_AS_FLOAT64 };
typedef struct { uint32_t offset, code, source; int64_t add; } Patch;
typedef struct {
  uint32_t offset, source, rank;
  int64_t add;
  int type, swizzle;
  uint64_t dims[5], strides[5];
  uint32_t box[5];
  /* maps that are kept, each in the slot that its address has: layers of a model share a program, not their memory */
  uint32_t slots, misses;
  uint64_t *addresses;
  uint8_t *bytes;   /* MAP_BYTES for each slot, aligned */
} Map;
typedef struct {
  void *function;
  unsigned grid[3], threads, shared;
  int early;       /* may begin while the kernel before it runs, which it waits for itself */
  uint32_t size, parameters, patch_count, map_count;
  uint32_t room;   /* bytes for the arguments and, at their end, the addresses of them */
  uint32_t *offsets;
  uint8_t *image;
  Patch *patches;
  Map *maps;
} Start;
typedef struct {
  PyObject_HEAD
  void *context;
  int ordinal, single;
  Py_ssize_t start_count, sources;   /* sources: values that it reads, of arguments and new tensors */
  Start *starts;
  size_t bytes;    /* for the arguments of all */
  PyObject *allocations, *results;   /* (shape, strides, dtype) of each; indices among them */
  PyObject *keep;
} Program;

static void *copied(const void *from, size_t size) {
  void *to = PyMem_Malloc(size ? size : 1);
  if (to) memcpy(to, from, size);
  return to ? to : PyErr_NoMemory();
}

static int read_words(PyObject *tuple, uint64_t *out, int most) {
  Py_ssize_t count = PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : -1;
  if (count < 0 || count > most) return PyErr_SetString(PyExc_ValueError, "a tensor map's sizes"), -1;
  for (Py_ssize_t i = 0; i < count; i++) {
    out[i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(tuple, i));
    if (PyErr_Occurred()) return -1;
  }
  return (int)count;
}

/* Twice as many slots, all empty; -1 if there is no memory, and the map is as before. */
static int map_grow(Map *map) {
  uint32_t slots = map->slots ? 2 * map->slots : 2;
  uint64_t *addresses = PyMem_Calloc(slots, sizeof *addresses);
  uint8_t *bytes = PyMem_Malloc((size_t)slots * MAP_BYTES + MAP_ALIGN);
  if (!addresses || !bytes) return PyMem_Free(addresses), PyMem_Free(bytes), -1;
  PyMem_Free(map->addresses), PyMem_Free(map->bytes);
  map->addresses = addresses, map->bytes = bytes, map->slots = slots, map->misses = 0;
  return 0;
}

static int read_map(PyObject *given, Map *map) {
  PyObject *dims, *strides, *box;
  uint64_t words[5];
  if (!PyArg_ParseTuple(given, "IILiOOOi", &map->offset, &map->source, &map->add, &map->type, &dims, &strides, &box,
                        &map->swizzle))
    return -1;
  int rank = read_words(dims, map->dims, 5);
  if (rank < 1 || read_words(strides, map->strides, 4) != rank - 1 || read_words(box, words, 5) != rank) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a tensor map's sizes differ in number");
    return -1;
  }
  for (int i = 0; i < rank; i++) map->box[i] = (uint32_t)words[i];
  map->rank = rank;
  return map_grow(map) ? (PyErr_NoMemory(), -1) : 0;
}

static uint8_t *aligned(uint8_t *at) { return (uint8_t *)(((uintptr_t)at + MAP_ALIGN - 1) & ~(uintptr_t)(MAP_ALIGN - 1)); }

static int read_start(PyObject *given, Start *start) {
  unsigned long long function;
  PyObject *offsets, *patches, *maps;
  const char *image;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(given, "K(III)IIpy#O!O!O!", &function, &start->grid[0], &start->grid[1], &start->grid[2],
                        &start->threads, &start->shared, &start->early, &image, &size, &PyTuple_Type, &offsets,
                        &PyTuple_Type, &patches, &PyTuple_Type, &maps))
    return -1;
  Py_ssize_t count = PyTuple_GET_SIZE(offsets), patch_count = PyTuple_GET_SIZE(patches), map_count = PyTuple_GET_SIZE(maps);
  if (size > MOST_IMAGE || count > MOST_PARAMETERS) return PyErr_SetString(PyExc_ValueError, "too many arguments"), -1;
  start->function = (void *)(uintptr_t)function;
  start->size = (uint32_t)size, start->parameters = (uint32_t)count;
  size_t room = (size_t)size + (size_t)(count + 1) * sizeof(void *);
  start->room = (uint32_t)((room + MAP_ALIGN - 1) & ~(size_t)(MAP_ALIGN - 1));
  if (!(start->image = copied(image, size))) return -1;
  if (!(start->offsets = PyMem_Calloc(count + 1, sizeof *start->offsets))) return PyErr_NoMemory(), -1;
  if (!(start->patches = PyMem_Calloc(patch_count + 1, sizeof *start->patches))) return PyErr_NoMemory(), -1;
  if (!(start->maps = PyMem_Calloc(map_count + 1, sizeof *start->maps))) return PyErr_NoMemory(), -1;
  for (Py_ssize_t i = 0; i < count; i++) {
    unsigned long offset = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(offsets, i));
    if (PyErr_Occurred()) return -1;
    if (offset >= (unsigned long)size) return PyErr_SetString(PyExc_ValueError, "an argument outside of the image"), -1;
    start->offsets[i] = (uint32_t)offset;
  }
  for (; start->patch_count < patch_count; start->patch_count++) {
    Patch *patch = &start->patches[start->patch_count];
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(patches, start->patch_count), "IIIL", &patch->offset, &patch->code,
                          &patch->source, &patch->add))
      return -1;
    int small = patch->code == INT32 || patch->code == FLOAT32 || patch->code == INT_AS_FLOAT32;
    if ((Py_ssize_t)patch->offset + (small ? 4 : 8) > size || patch->source >= MOST_VALUES)
      return PyErr_SetString(PyExc_ValueError, "a value outside of the image"), -1;
  }
  for (Py_ssize_t i = 0; i < map_count; i++) {
    Map *map = &start->maps[i];
    start->map_count = (uint32_t)i + 1;
    if (read_map(PyTuple_GET_ITEM(maps, i), map)) return -1;
    if ((Py_ssize_t)map->offset + MAP_BYTES > size || map->source >= MOST_VALUES)
      return PyErr_SetString(PyExc_ValueError, "a tensor map outside of the image"), -1;
  }
  return 0;
}

static int program_init(Program *self, PyObject *args, PyObject *keywords) {
  static char *names[] = {"context", "ordinal", "starts", "allocations", "results", "single", "keep", NULL};
  unsigned long long context;
  PyObject *starts, *allocations, *results, *keep;
  if (self->starts) return PyErr_SetString(PyExc_TypeError, "a program is made once"), -1;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "KiO!O!O!pO", names, &context, &self->ordinal, &PyTuple_Type, &starts,
                                   &PyTuple_Type, &allocations, &PyTuple_Type, &results, &self->single, &keep))
    return -1;
  Py_ssize_t count = PyTuple_GET_SIZE(starts);
  self->context = (void *)(uintptr_t)context;
  Py_XSETREF(self->allocations, Py_NewRef(allocations));
  Py_XSETREF(self->results, Py_NewRef(results));
  Py_XSETREF(self->keep, Py_NewRef(keep));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(allocations); i++) {
    PyObject *entry = PyTuple_GET_ITEM(allocations, i);
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != 3)
      return PyErr_SetString(PyExc_ValueError, "an allocation is shape, strides, dtype"), -1;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(results); i++) {
    Py_ssize_t index = PyLong_AsSsize_t(PyTuple_GET_ITEM(results, i));
    if (index < 0 || index >= PyTuple_GET_SIZE(allocations)) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a result is the index of an allocation");
      return -1;
    }
  }
  if (!(self->starts = PyMem_Calloc(count + 1, sizeof *self->starts))) return PyErr_NoMemory(), -1;
  self->bytes = MAP_ALIGN;
  for (Py_ssize_t i = 0; i < count; i++) {
    self->start_count = i + 1;   /* what is half read is freed too */
    Start *start = &self->starts[i];
    if (read_start(PyTuple_GET_ITEM(starts, i), start)) return -1;
    self->bytes += start->room;
    for (uint32_t j = 0; j < start->patch_count; j++) self->sources = Py_MAX(self->sources, start->patches[j].source + 1);
    for (uint32_t j = 0; j < start->map_count; j++) self->sources = Py_MAX(self->sources, start->maps[j].source + 1);
  }
  return 0;
}

static int program_traverse(Program *self, visitproc visit, void *arg) {
  Py_VISIT(self->allocations);
  Py_VISIT(self->results);
  Py_VISIT(self->keep);
  return 0;
}

static int program_clear(Program *self) {
  Py_CLEAR(self->allocations);
  Py_CLEAR(self->results);
  Py_CLEAR(self->keep);
  return 0;
}

static void program_dealloc(Program *self) {
  for (Py_ssize_t i = 0; i < self->start_count; i++) {
    Start *start = &self->starts[i];
    for (uint32_t j = 0; j < start->map_count; j++) PyMem_Free(start->maps[j].bytes), PyMem_Free(start->maps[j].addresses);
    PyMem_Free(start->image), PyMem_Free(start->offsets), PyMem_Free(start->patches), PyMem_Free(start->maps);
  }
  PyMem_Free(self->starts);
  deallocate((PyObject *)self);
}

static PyTypeObject ProgramType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "tilewright.runtime._native.Program",
    .tp_basicsize = sizeof(Program),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)program_init,
    .tp_dealloc = (destructor)program_dealloc,
    .tp_traverse = (traverseproc)program_traverse,
    .tp_clear = (inquiry)program_clear,
};

/* --- running ---------------------------------------------------------------------------------------- */

/* The handle of the stream to start in: 0, or -1 where Python has to find out. */
static int find_stream(Host *host, Program *program, PyObject *given, void **stream) {
  if (!given || given == Py_None) return host->exchange->stream_of(host->device_type, program->ordinal, stream) ? -1 : 0;
  PyObject *handle = PyLong_CheckExact(given) ? Py_NewRef(given) : PyObject_GetAttr(given, name_cuda_stream);
  if (!handle) return -1;
  *stream = PyLong_AsVoidPtr(handle);
  Py_DECREF(handle);
  return PyErr_Occurred() ? -1 : 0;
}

/* The map for an address, kept or made; NULL if the driver refuses. */
static const uint8_t *encoded(Host *host, Map *map, uint64_t address) {
  static const uint32_t ones[5] = {1, 1, 1, 1, 1};
  /* as many slots as there are addresses in use, roughly; without memory for more it goes on with those it has */
  if (map->misses > 4 * map->slots && map->slots < MOST_MAPS) map_grow(map);
  uint32_t slot = (uint32_t)((address * 0x9E3779B97F4A7C15u) >> 40) & (map->slots - 1);
  /* or its neighbour, so that two addresses that take turns never drive each other out */
  uint32_t other = slot ^ 1;
  if (map->addresses[slot] != address &&
      (map->addresses[other] == address || (map->addresses[slot] && (!map->addresses[other] || map->misses & 1))))
    slot = other;
  uint8_t *bytes = aligned(map->bytes) + (size_t)slot * MAP_BYTES;
  if (address && map->addresses[slot] == address) return bytes;
  map->addresses[slot] = 0;
  map->misses++;
  if (host->encode(bytes, map->type, map->rank, (void *)(uintptr_t)address, map->dims, map->strides, map->box, ones, 0,
                   map->swizzle, 3, 0))
    return NULL;
  map->addresses[slot] = address;
  return bytes;
}

/* The arguments of one start for these values, written to `image`. -1: not to be had, no error set. */
static int fill(Host *host, Start *start, const uint64_t *values, uint8_t *image) {
  memcpy(image, start->image, start->size);
  for (Patch *patch = start->patches; patch < start->patches + start->patch_count; patch++) {
    uint64_t value = values[patch->source];
    uint8_t *to = image + patch->offset;
    double number;
    float single;
    switch (patch->code) {
    case ADDRESS: value += (uint64_t)patch->add; /* fall through */
    case INT64:
    case FLOAT64: memcpy(to, &value, 8); break;
    case INT32: memcpy(to, &value, 4); break;
    case INT_AS_FLOAT64: number = (double)(int64_t)value, memcpy(to, &number, 8); break;
    default:
      memcpy(&number, &value, 8);
      if (patch->code == INT_AS_FLOAT32) number = (double)(int64_t)value;
      single = (float)number;
      if (isinf(single) && !isinf(number)) return -1;
      memcpy(to, &single, 4);
    }
  }
  for (Map *map = start->maps; map < start->maps + start->map_count; map++) {
    const uint8_t *bytes = encoded(host, map, values[map->source] + (uint64_t)map->add);
    if (!bytes) return -1;
    memcpy(image + map->offset, bytes, MAP_BYTES);
  }
  return 0;
}

static int start_one(Host *host, const Start *start, void **arguments, void *stream) {
  static const LaunchAttribute overlap = {.id = 6 /* CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION */, .value = {1}};
  const unsigned *grid = start->grid;
  if (!start->early)
    return host->launch(start->function, grid[0], grid[1], grid[2], start->threads, 1, 1, start->shared, stream, arguments,
                        NULL);
  LaunchConfig config = {{grid[0], grid[1], grid[2]}, {start->threads, 1, 1}, start->shared, stream, &overlap, 1};
  return host->launch_early(&config, start->function, arguments, NULL);
}

/* All arguments first, so that the interpreter's lock is given back once for all kernels. */
static int start_all(Host *host, Program *program, const uint64_t *values, void *stream) {
  uint8_t few[2 * MOST_IMAGE], *memory = few;
  int failed = 0;
  if (program->bytes > sizeof few && !(memory = PyMem_Malloc(program->bytes))) return -1;
  uint8_t *image = aligned(memory);
  Start *first = program->starts, *last = first + program->start_count;
  for (Start *start = first; start < last && !failed; image += start->room, start++) {
    failed = fill(host, start, values, image);
    void **pointers = (void **)(image + start->room) - start->parameters;
    for (uint32_t i = 0; i < start->parameters; i++) pointers[i] = image + start->offsets[i];
  }
  if (!failed) {
    Py_BEGIN_ALLOW_THREADS;
    image = aligned(memory);
    for (Start *start = first; start < last && !failed; image += start->room, start++)
      failed = start_one(host, start, (void **)(image + start->room) - start->parameters, stream);
    Py_END_ALLOW_THREADS;
  }
  if (memory != few) PyMem_Free(memory);
  return failed ? -1 : 0;
}

/* New tensors for the results and between the kernels. */
static int allocate_all(Host *host, Program *program, uint64_t *addresses, PyObject **made, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; i++) {
    DLTensor view;
    PyObject *entry = PyTuple_GET_ITEM(program->allocations, i);
    if (!(made[i] = PyObject_Vectorcall(host->allocate, ((PyTupleObject *)entry)->ob_item, 3, NULL))) return -1;
    if (host->exchange->tensor_of(made[i], &view)) return -1;
    addresses[i] = (uint64_t)(uintptr_t)view.data + view.byte_offset;
    if (view.device.id != program->ordinal || view.device.type != host->device_type || (uintptr_t)view.data & 15) return -1;
  }
  return 0;
}

static PyObject *gather(Program *program, PyObject **made) {
  Py_ssize_t count = PyTuple_GET_SIZE(program->results);
  if (!count) Py_RETURN_NONE;
  if (program->single) return Py_NewRef(made[PyLong_AsSsize_t(PyTuple_GET_ITEM(program->results, 0))]);
  PyObject *results = PyTuple_New(count);
  for (Py_ssize_t i = 0; results && i < count; i++)
    PyTuple_SET_ITEM(results, i, Py_NewRef(made[PyLong_AsSsize_t(PyTuple_GET_ITEM(program->results, i))]));
  return results;
}

/* The program's results for `given` arguments, of which `values` are the addresses and numbers, with room behind them.
   NULL with no error set where the call has to go through Python. */
static PyObject *program_run(Host *host, Program *program, uint64_t *values, Py_ssize_t given, PyObject *on) {
  void *context = NULL, *stream = NULL;
  PyObject *made[MOST_VALUES] = {NULL}, *results = NULL;
  Py_ssize_t count = PyTuple_GET_SIZE(program->allocations);
  if (count + given > MOST_VALUES || program->sources > count + given) return NULL;
  if (host->context(&context) || context != program->context) return NULL;
  if (!find_stream(host, program, on, &stream) && !allocate_all(host, program, values + given, made, count) &&
      !start_all(host, program, values, stream))
    results = gather(program, made);
  for (Py_ssize_t i = 0; i < count; i++) Py_XDECREF(made[i]);
  if (!results) PyErr_Clear();   /* Python repeats the call, and with it the error */
  return results;
}
