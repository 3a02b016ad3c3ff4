/* Repeated launches without Python: see native.py, which also says what is optional.

   A `Table` is a callable in front of a Python function. It looks at its arguments (tensors through DLPack's exchange
   functions, numbers, names), and where it has seen their like twice it has a `Program`: kernels to start, the bytes of
   their arguments, and where in those bytes addresses and numbers of the present call belong. Everything else goes to
   the Python function. All of it holds the interpreter's lock, but for the starts themselves. */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <structmember.h>
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define VERSION 1   /* of what it offers; native.py asks for the same */
#define MOST_WORDS 192
#define MOST_OBJECTS 64
#define MOST_VALUES 48
#define MOST_IMAGE 8192
#define MOST_PARAMETERS 256
#define MAP_BYTES 128
#define MAP_ALIGN 64

/* --- DLPack's exchange functions (dlpack.h 1.2) and the driver's -------------------------------- */

typedef struct { int32_t type, id; } Place;
typedef struct { uint8_t code, bits; uint16_t lanes; } ElementType;
typedef struct {
  void *data;
  Place device;
  int32_t ndim;
  ElementType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} DLTensor;
typedef struct {
  struct { uint32_t major, minor; } version;
  void *previous, *allocator, *from_object, *to_object;
  int (*tensor_of)(void *object, DLTensor *out);
  int (*stream_of)(int32_t device_type, int32_t device_id, void **out);
} Exchange;

typedef int (*LaunchKernel)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                            void **);
typedef int (*EncodeMap)(void *, int, unsigned, void *, const uint64_t *, const uint64_t *, const uint32_t *,
                         const uint32_t *, int, int, int, int);
typedef int (*GetContext)(void **);

/* --- Host: what calls go through ------------------------------------------------------------------ */

typedef struct {
  PyObject_HEAD
  PyObject *capsule, *types, *allocate, *gradients, *plain, *quiet;
  Exchange *exchange;
  LaunchKernel launch;
  EncodeMap encode;
  GetContext context;
  int device_type;
  void *library;           /* that defines the dispatcher's state of a thread */
  PyObject *state_name;
  uint64_t allowed[2];     /* bits of that state that may differ from a thread's first */
} Host;

static _Thread_local uint64_t *dispatch_state;
static PyObject *name_requires_grad, *name_cuda_stream, *name_stream;

static int host_init(Host *self, PyObject *args, PyObject *keywords) {
  static char *names[] = {"exchange", "types", "allocate", "gradients", "plain", "quiet", "device_type", "launch", "encode",
                          "context", "library", "state", "allowed", NULL};
  PyObject *capsule, *types, *allocate, *gradients, *plain, *quiet, *state;
  unsigned long long launch, encode, context, included, excluded;
  const char *library;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO!OOOO!iKKKzO(KK)", names, &capsule, &PyTuple_Type, &types, &allocate,
                                   &gradients, &plain, &PyTuple_Type, &quiet, &self->device_type, &launch, &encode,
                                   &context, &library, &state, &included, &excluded))
    return -1;
  Exchange *exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!exchange) return -1;
  if (exchange->version.major != 1 || !exchange->tensor_of || !exchange->stream_of) {
    PyErr_SetString(PyExc_ValueError, "the exchange functions are of another version of DLPack");
    return -1;
  }
  self->exchange = exchange;
  self->launch = (LaunchKernel)(uintptr_t)launch;
  self->encode = (EncodeMap)(uintptr_t)encode;
  self->context = (GetContext)(uintptr_t)context;
  self->allowed[0] = included, self->allowed[1] = excluded;
  self->library = library ? dlopen(library, RTLD_LAZY | RTLD_NOLOAD) : NULL;
  Py_XSETREF(self->capsule, Py_NewRef(capsule));
  Py_XSETREF(self->types, Py_NewRef(types));
  Py_XSETREF(self->allocate, Py_NewRef(allocate));
  Py_XSETREF(self->gradients, Py_NewRef(gradients));
  Py_XSETREF(self->plain, Py_NewRef(plain));
  Py_XSETREF(self->quiet, Py_NewRef(quiet));
  Py_XSETREF(self->state_name, Py_NewRef(state));
  return 0;
}

static int host_traverse(Host *self, visitproc visit, void *arg) {
  Py_VISIT(self->capsule);
  Py_VISIT(self->types);
  Py_VISIT(self->allocate);
  Py_VISIT(self->gradients);
  Py_VISIT(self->plain);
  Py_VISIT(self->quiet);
  Py_VISIT(self->state_name);
  return 0;
}

static int host_clear(Host *self) {
  Py_CLEAR(self->capsule);
  Py_CLEAR(self->types);
  Py_CLEAR(self->allocate);
  Py_CLEAR(self->gradients);
  Py_CLEAR(self->plain);
  Py_CLEAR(self->quiet);
  Py_CLEAR(self->state_name);
  return 0;
}

static void deallocate(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  type->tp_clear(self);
  type->tp_free(self);
}

/* The dispatcher's state of this thread, or NULL where it cannot be seen. */
static uint64_t *host_state(Host *host) {
  if (!host->library) return NULL;
  if (!dispatch_state) {
    const char *name = PyUnicode_AsUTF8(host->state_name);
    dispatch_state = name ? dlsym(host->library, name) : NULL;
  }
  return dispatch_state;
}

static PyObject *host_read_state(Host *self, PyObject *ignored) {
  uint64_t *state = host_state(self);
  if (!state) Py_RETURN_NONE;
  return Py_BuildValue("KK", (unsigned long long)state[0], (unsigned long long)state[1]);
}

/* Whether a call of no arguments gives false: 1; 0 if it gives true, -1 with an error set. */
static int is_false(PyObject *callable) {
  PyObject *found = PyObject_CallNoArgs(callable);
  if (!found) return -1;
  int truth = PyObject_IsTrue(found);
  Py_DECREF(found);
  return truth < 0 ? -1 : !truth;
}

/* Whether nothing watches or transforms calls of operators in this thread. */
static int host_plain(Host *host) {
  uint64_t *state = host_state(host);
  if (state) {
    if ((state[0] & ~host->allowed[0]) | (state[1] & ~host->allowed[1])) return 0;
  } else {
    int answer = is_false(host->plain);
    if (answer != 1) return answer;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(host->quiet); i++) {
    int answer = is_false(PyTuple_GET_ITEM(host->quiet, i));
    if (answer != 1) return answer;
  }
  return 1;
}

static PyMethodDef host_methods[] = {
    {"state", (PyCFunction)host_read_state, METH_NOARGS, "The dispatcher's two words for this thread; None if not seen."},
    {NULL}};

static PyTypeObject HostType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "tilewright.runtime._native.Host",
    .tp_basicsize = sizeof(Host),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)host_init,
    .tp_dealloc = deallocate,
    .tp_traverse = (traverseproc)host_traverse,
    .tp_clear = (inquiry)host_clear,
    .tp_methods = host_methods,
};

/* --- Program: kernels to start -------------------------------------------------------------------- */

enum { ADDRESS, INT32, INT64, FLOAT32, FLOAT64, INT_AS_FLOAT32, INT_AS_FLOAT64 };
typedef struct { uint32_t offset, code, source; int64_t add; } Patch;
typedef struct {
  uint32_t offset, source, rank;
  int64_t add;
  int type, swizzle;
  uint64_t dims[5], strides[5], encoded;   /* the address that `bytes` are for */
  uint32_t box[5];
  uint8_t *bytes;                          /* MAP_BYTES, aligned */
} Map;
typedef struct {
  void *function;
  unsigned grid[3], threads, shared;
  uint32_t size, parameters, patch_count, map_count;
  uint32_t *offsets;
  uint8_t *image;
  Patch *patches;
  Map *maps;
} Start;
typedef struct {
  PyObject_HEAD
  void *context;
  int ordinal, single;
  Py_ssize_t start_count;
  Start *starts;
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

static int read_map(PyObject *given, Map *map) {
  PyObject *dims, *strides, *box;
  uint64_t words[5];
  if (!PyArg_ParseTuple(given, "IILiOOOi", &map->offset, &map->source, &map->add, &map->type, &dims, &strides, &box,
                        &map->swizzle))
    return -1;
  int rank = read_words(dims, map->dims, 5);
  if (rank < 0 || read_words(strides, map->strides, 4) < 0 || read_words(box, words, 5) != rank) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a tensor map's box");
    return -1;
  }
  for (int i = 0; i < rank; i++) map->box[i] = (uint32_t)words[i];
  map->rank = rank;
  map->bytes = PyMem_Malloc(MAP_BYTES + MAP_ALIGN);
  return map->bytes ? 0 : (PyErr_NoMemory(), -1);
}

static uint8_t *aligned(uint8_t *at) { return (uint8_t *)(((uintptr_t)at + MAP_ALIGN - 1) & ~(uintptr_t)(MAP_ALIGN - 1)); }

static int read_start(PyObject *given, Start *start) {
  unsigned long long function;
  PyObject *offsets, *patches, *maps;
  const char *image;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(given, "K(III)IIy#O!O!O!", &function, &start->grid[0], &start->grid[1], &start->grid[2],
                        &start->threads, &start->shared, &image, &size, &PyTuple_Type, &offsets, &PyTuple_Type, &patches,
                        &PyTuple_Type, &maps))
    return -1;
  Py_ssize_t count = PyTuple_GET_SIZE(offsets), patch_count = PyTuple_GET_SIZE(patches), map_count = PyTuple_GET_SIZE(maps);
  if (size > MOST_IMAGE || count > MOST_PARAMETERS) return PyErr_SetString(PyExc_ValueError, "too many arguments"), -1;
  start->function = (void *)(uintptr_t)function;
  start->size = (uint32_t)size, start->parameters = (uint32_t)count;
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
    if (patch->offset + (small ? 4 : 8) > size || patch->source >= MOST_VALUES)
      return PyErr_SetString(PyExc_ValueError, "a value outside of the image"), -1;
  }
  for (Py_ssize_t i = 0; i < map_count; i++) {
    Map *map = &start->maps[i];
    start->map_count = (uint32_t)i + 1;
    if (read_map(PyTuple_GET_ITEM(maps, i), map)) return -1;
    if (map->offset + MAP_BYTES > size || map->source >= MOST_VALUES)
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
  self->allocations = Py_NewRef(allocations), self->results = Py_NewRef(results), self->keep = Py_NewRef(keep);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(allocations); i++) {
    PyObject *entry = PyTuple_GET_ITEM(allocations, i);
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != 3)
      return PyErr_SetString(PyExc_ValueError, "an allocation is shape, strides, dtype"), -1;
  }
  if (!(self->starts = PyMem_Calloc(count + 1, sizeof *self->starts))) return PyErr_NoMemory(), -1;
  for (Py_ssize_t i = 0; i < count; i++) {
    self->start_count = i + 1;   /* what is half read is freed too */
    if (read_start(PyTuple_GET_ITEM(starts, i), &self->starts[i])) return -1;
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
    for (uint32_t j = 0; j < start->map_count; j++) PyMem_Free(start->maps[j].bytes);
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

/* --- keys of calls --------------------------------------------------------------------------------- */

typedef struct {
  uint64_t words[MOST_WORDS], values[MOST_VALUES], tensors;   /* bit i: values[i] is the address of a tensor */
  PyObject *objects[MOST_OBJECTS];                            /* borrowed */
  int word_count, object_count, value_count;
} Key;

enum { TENSOR = 1, BOOL, INT, FLOAT, NONE, OBJECT, SEQUENCE, NUMBER };

static int put(Key *key, uint64_t word) {
  if (key->word_count == MOST_WORDS) return -1;
  key->words[key->word_count++] = word;
  return 0;
}

static int put_object(Key *key, PyObject *object, uint64_t word) {
  if (key->object_count == MOST_OBJECTS || put(key, word)) return -1;
  key->objects[key->object_count++] = object;
  return 0;
}

/* The address of a tensor, its kind added to the key; -1 for one that programs do not take. */
static int put_tensor(Host *host, Key *key, PyObject *tensor, uint64_t *address) {
  DLTensor view;
  if (host->exchange->tensor_of(tensor, &view)) return PyErr_Clear(), -1;
  if (view.device.type != host->device_type || (view.ndim && !view.strides) || view.ndim > 32) return -1;
  *address = (uint64_t)(uintptr_t)view.data + view.byte_offset;
  uint64_t type = view.dtype.code | (uint64_t)view.dtype.bits << 8 | (uint64_t)view.dtype.lanes << 16;
  if (put(key, TENSOR | (uint64_t)view.ndim << 8 | (*address & 15) << 16 | (uint64_t)view.device.id << 24) || put(key, type))
    return -1;
  int empty = 0;
  for (int i = 0; i < view.ndim; i++) {
    if (put(key, (uint64_t)view.shape[i]) || put(key, (uint64_t)view.strides[i])) return -1;
    empty |= view.shape[i] == 0;
  }
  return view.data || empty ? 0 : -1;   /* torch's tensors that stand for zeros have no memory */
}

static int by_identity(PyTypeObject *type) {
  return type->tp_hash == PyBaseObject_Type.tp_hash && type->tp_richcompare == PyBaseObject_Type.tp_richcompare;
}

/* Anything but a tensor. `numbers`: ints and floats count by their kind, the value is put into arguments. */
static int put_value(Key *key, PyObject *object, int numbers, uint64_t *value) {
  PyTypeObject *type = Py_TYPE(object);
  if (object == Py_None) return put(key, NONE);
  if (type == &PyBool_Type) return put(key, BOOL | (uint64_t)(object == Py_True) << 8);
  if (type == &PyLong_Type) {
    int overflow;
    int64_t number = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow) return -1;
    *value = (uint64_t)number;
    if (numbers) return put(key, NUMBER | INT << 8 | (uint64_t)(number == (int32_t)number) << 16);
    return put(key, INT) || put(key, (uint64_t)number) ? -1 : 0;
  }
  if (type == &PyFloat_Type) {
    double number = PyFloat_AS_DOUBLE(object);
    memcpy(value, &number, 8);
    if (numbers) return put(key, NUMBER | FLOAT << 8);
    return put(key, FLOAT) || put(key, *value) ? -1 : 0;
  }
  if (type == &PyUnicode_Type) {
    Py_hash_t hash = PyObject_Hash(object);
    return put_object(key, object, OBJECT | (uint64_t)hash << 8);
  }
  if (PyTuple_Check(object) || type == &PyList_Type) {
    Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
    if (put_object(key, (PyObject *)type, SEQUENCE | (uint64_t)count << 8)) return -1;
    for (Py_ssize_t i = 0; i < count; i++) {
      uint64_t ignored;
      PyObject *item = PySequence_Fast_GET_ITEM(object, i);
      if (PyTuple_Check(item) || PyList_Check(item) || put_value(key, item, 0, &ignored)) return -1;
    }
    return 0;
  }
  if (by_identity(type)) return put_object(key, object, OBJECT | (uint64_t)(uintptr_t)object << 8);
  return -1;
}

static uint64_t key_hash(const Key *key) {
  uint64_t hash = 0x9E3779B97F4A7C15u ^ (uint64_t)key->word_count;
  for (int i = 0; i < key->word_count; i++) {
    hash = (hash ^ key->words[i]) * 0xFF51AFD7ED558CCDu;
    hash ^= hash >> 32;
  }
  return hash;
}

/* --- Table ----------------------------------------------------------------------------------------- */

typedef struct {
  uint64_t hash;
  int word_count, object_count;
  uint64_t *words;
  PyObject **objects;
  PyObject *program;   /* NULL: seen once; None: has none */
} Entry;

typedef struct {
  PyObject_HEAD
  vectorcallfunc call;
  Host *host;
  PyObject *slow, *record;
  uint64_t numbers;    /* positions whose numbers are arguments of kernels */
  int launches;        /* the first two arguments are a grid and a device, and the keyword `stream` is one */
  size_t size, used, most;
  Entry **slots;
} Table;

static void entry_free(Entry *entry) {
  for (int i = 0; i < entry->object_count; i++) Py_XDECREF(entry->objects[i]);
  Py_XDECREF(entry->program);
  PyMem_Free(entry->words), PyMem_Free(entry->objects), PyMem_Free(entry);
}

static void table_empty(Table *self) {
  Entry **slots = self->slots;
  size_t size = self->size;
  self->slots = NULL, self->size = self->used = 0;
  for (size_t i = 0; i < size; i++)
    if (slots[i]) entry_free(slots[i]);
  PyMem_Free(slots);
}

static int same(const Entry *entry, const Key *key, uint64_t hash) {
  if (entry->hash != hash || entry->word_count != key->word_count || entry->object_count != key->object_count) return 0;
  if (memcmp(entry->words, key->words, key->word_count * sizeof *key->words)) return 0;
  for (int i = 0; i < key->object_count; i++) {
    PyObject *a = entry->objects[i], *b = key->objects[i];
    if (a != b && !(PyUnicode_CheckExact(a) && PyUnicode_CheckExact(b) && PyUnicode_Compare(a, b) == 0)) return 0;
  }
  return 1;
}

/* The slot of a key, or the free one where it belongs; NULL if the table has none at all. */
static Entry **table_find(Table *self, const Key *key, uint64_t hash) {
  for (size_t i = hash; self->size; i++) {
    Entry **slot = &self->slots[i & (self->size - 1)];
    if (!*slot || same(*slot, key, hash)) return slot;
  }
  return NULL;
}

static int table_grow(Table *self) {
  size_t size = self->size ? self->size * 2 : 16;
  Entry **slots = PyMem_Calloc(size, sizeof *slots);
  if (!slots) return PyErr_NoMemory(), -1;
  for (size_t i = 0; i < self->size; i++)
    if (self->slots[i]) {
      size_t at = self->slots[i]->hash & (size - 1);
      while (slots[at]) at = (at + 1) & (size - 1);
      slots[at] = self->slots[i];
    }
  PyMem_Free(self->slots);
  self->slots = slots, self->size = size;
  return 0;
}

static int table_add(Table *self, const Key *key, uint64_t hash, PyObject *program) {
  if (self->used >= self->most) table_empty(self);
  if (2 * self->used >= self->size && table_grow(self)) return -1;
  Entry **slot = table_find(self, key, hash);
  if (!*slot) {
    Entry *entry = PyMem_Calloc(1, sizeof *entry);
    if (!entry || !(entry->words = copied(key->words, key->word_count * sizeof *key->words)) ||
        !(entry->objects = copied(key->objects, key->object_count * sizeof *key->objects))) {
      if (entry) PyMem_Free(entry->words), PyMem_Free(entry);
      return PyErr_NoMemory(), -1;
    }
    entry->hash = hash, entry->word_count = key->word_count, entry->object_count = key->object_count;
    for (int i = 0; i < key->object_count; i++) Py_INCREF(key->objects[i]);
    *slot = entry;
    self->used++;
  }
  Py_XSETREF((*slot)->program, Py_XNewRef(program));
  return 0;
}

/* The key of a call: 0; -1 if programs do not take such arguments, no error set. */
static int table_key(Table *self, Key *key, PyObject *const *args, Py_ssize_t count, PyObject *names, PyObject **stream) {
  Py_ssize_t all = count + (names ? PyTuple_GET_SIZE(names) : 0);
  if (all > MOST_VALUES) return -1;
  key->word_count = key->object_count = key->value_count = 0, key->tensors = 0;
  if (put(key, (uint64_t)count)) return -1;
  for (Py_ssize_t i = 0; i < all; i++) {
    PyObject *object = args[i], *type = (PyObject *)Py_TYPE(object);
    if (i >= count) {
      PyObject *name = PyTuple_GET_ITEM(names, i - count);
      if (self->launches && (name == name_stream || PyUnicode_Compare(name, name_stream) == 0)) {
        *stream = object;
        continue;
      }
      Py_hash_t hash = PyObject_Hash(name);
      if (put_object(key, name, (uint64_t)hash)) return -1;
    }
    Py_ssize_t kind = 0, kinds = PyTuple_GET_SIZE(self->host->types);
    while (kind < kinds && type != PyTuple_GET_ITEM(self->host->types, kind)) kind++;
    int at = key->value_count++;
    if (kind < kinds) {
      if (put_tensor(self->host, key, object, &key->values[at])) return -1;
      key->tensors |= (uint64_t)1 << at;
    } else if (put_value(key, object, i < count && self->numbers >> i & 1, &key->values[at])) {
      return -1;
    }
  }
  return key->tensors ? 0 : -1;
}

/* Whether a gradient of an argument is to be recorded: 1, 0, or -1 with an error set. */
static int wants_gradients(Table *self, const Key *key, PyObject *const *args) {
  int off = is_false(self->host->gradients);
  if (off) return off < 0 ? -1 : 0;
  for (uint64_t rest = key->tensors; rest; rest &= rest - 1) {
    PyObject *flag = PyObject_GetAttr(args[__builtin_ctzll(rest)], name_requires_grad);
    if (!flag) return -1;
    int truth = PyObject_IsTrue(flag);
    Py_DECREF(flag);
    if (truth) return truth;
  }
  return 0;
}

/* The handle of the stream to start in: 0, or -1 where Python has to find out. */
static int find_stream(Host *host, Program *program, PyObject *given, void **stream) {
  if (!given || given == Py_None) return host->exchange->stream_of(host->device_type, program->ordinal, stream) ? -1 : 0;
  PyObject *handle = PyLong_CheckExact(given) ? Py_NewRef(given) : PyObject_GetAttr(given, name_cuda_stream);
  if (!handle) return -1;
  *stream = PyLong_AsVoidPtr(handle);
  Py_DECREF(handle);
  return PyErr_Occurred() ? -1 : 0;
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
    uint64_t address = values[map->source] + (uint64_t)map->add;
    uint8_t *bytes = aligned(map->bytes);
    if (map->encoded != address || !address) {
      static const uint32_t ones[5] = {1, 1, 1, 1, 1};
      map->encoded = 0;
      if (host->encode(bytes, map->type, map->rank, (void *)(uintptr_t)address, map->dims, map->strides, map->box, ones, 0,
                       map->swizzle, 3, 0))
        return -1;
      map->encoded = address;
    }
    memcpy(image + map->offset, bytes, MAP_BYTES);
  }
  return 0;
}

static int start_all(Host *host, Program *program, const uint64_t *values, void *stream) {
  uint8_t memory[MOST_IMAGE + MAP_ALIGN], *image = aligned(memory);
  void *pointers[MOST_PARAMETERS];
  for (Start *start = program->starts; start < program->starts + program->start_count; start++) {
    int status;
    if (fill(host, start, values, image)) return -1;
    for (uint32_t i = 0; i < start->parameters; i++) pointers[i] = image + start->offsets[i];
    Py_BEGIN_ALLOW_THREADS;
    status = host->launch(start->function, start->grid[0], start->grid[1], start->grid[2], start->threads, 1, 1,
                          start->shared, stream, pointers, NULL);
    Py_END_ALLOW_THREADS;
    if (status) return -1;
  }
  return 0;
}

/* New tensors for the results and between the kernels, their addresses behind those of the arguments. */
static int allocate_all(Host *host, Program *program, Key *key, PyObject **made, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; i++) {
    DLTensor view;
    PyObject *entry = PyTuple_GET_ITEM(program->allocations, i);
    if (!(made[i] = PyObject_Vectorcall(host->allocate, ((PyTupleObject *)entry)->ob_item, 3, NULL))) return -1;
    if (host->exchange->tensor_of(made[i], &view)) return -1;
    key->values[key->value_count + i] = (uint64_t)(uintptr_t)view.data + view.byte_offset;
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

/* The program's results, or NULL with no error set where the call has to go through Python. */
static PyObject *run(Table *self, Program *program, Key *key, PyObject *given) {
  Host *host = self->host;
  void *context = NULL, *stream = NULL;
  PyObject *made[MOST_VALUES] = {NULL}, *results = NULL;
  Py_ssize_t count = PyTuple_GET_SIZE(program->allocations);
  if (count + key->value_count > MOST_VALUES || host->context(&context) || context != program->context) return NULL;
  if (!find_stream(host, program, given, &stream) && !allocate_all(host, program, key, made, count) &&
      !start_all(host, program, key->values, stream))
    results = gather(program, made);
  for (Py_ssize_t i = 0; i < count; i++) Py_XDECREF(made[i]);
  if (!results) PyErr_Clear();   /* Python repeats the call, and with it the error */
  return results;
}

static PyObject *table_record(Table *self, Key *key, uint64_t hash, PyObject *const *args, size_t flags, PyObject *names) {
  PyObject *pair = PyObject_Vectorcall(self->record, args, flags, names);
  if (!pair) return NULL;
  if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2)
    return Py_DECREF(pair), PyErr_SetString(PyExc_TypeError, "record gives a result and a program"), NULL;
  PyObject *result = Py_NewRef(PyTuple_GET_ITEM(pair, 0)), *program = PyTuple_GET_ITEM(pair, 1);
  int valid = program == Py_None || Py_TYPE(program) == &ProgramType;
  if (!valid) PyErr_SetString(PyExc_TypeError, "record gives a result and a program");
  if (!valid || table_add(self, key, hash, program)) Py_CLEAR(result);
  Py_DECREF(pair);
  return result;
}

static PyObject *table_call(PyObject *object, PyObject *const *args, size_t flags, PyObject *names) {
  Table *self = (Table *)object;
  Key key;
  PyObject *stream = NULL;
  Py_ssize_t count = PyVectorcall_NARGS(flags);
  int plain = self->launches || host_plain(self->host);
  if (plain < 0) return NULL;
  if (!plain || table_key(self, &key, args, count, names, &stream)) goto slow;
  if (!self->launches) {
    int wants = wants_gradients(self, &key, args);
    if (wants < 0) return NULL;
    if (wants) goto slow;
  }
  uint64_t hash = key_hash(&key);
  Entry **slot = table_find(self, &key, hash);
  if (!slot || !*slot) {
    if (table_add(self, &key, hash, NULL)) return NULL;
    goto slow;
  }
  if (!(*slot)->program) return table_record(self, &key, hash, args, flags, names);
  if ((*slot)->program == Py_None) goto slow;
  PyObject *program = Py_NewRef((*slot)->program);   /* another thread may empty the table while a kernel starts */
  PyObject *result = run(self, (Program *)program, &key, stream);
  Py_DECREF(program);
  if (result) return result;
slow:
  return PyObject_Vectorcall(self->slow, args, flags, names);
}

static int table_init(Table *self, PyObject *args, PyObject *keywords) {
  static char *names[] = {"host", "slow", "record", "launches", "numbers", "most", NULL};
  PyObject *host, *slow, *record;
  unsigned long long numbers;
  Py_ssize_t most;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!OOpKn", names, &HostType, &host, &slow, &record, &self->launches,
                                   &numbers, &most))
    return -1;
  self->call = table_call;
  self->numbers = numbers;
  self->most = most;
  Py_XSETREF(self->host, (Host *)Py_NewRef(host));
  Py_XSETREF(self->slow, Py_NewRef(slow));
  Py_XSETREF(self->record, Py_NewRef(record));
  return 0;
}

static int table_traverse(Table *self, visitproc visit, void *arg) {
  Py_VISIT(self->host);
  Py_VISIT(self->slow);
  Py_VISIT(self->record);
  for (size_t i = 0; i < self->size; i++)
    if (self->slots[i]) {
      Py_VISIT(self->slots[i]->program);
      for (int j = 0; j < self->slots[i]->object_count; j++) Py_VISIT(self->slots[i]->objects[j]);
    }
  return 0;
}

static int table_clear(Table *self) {
  table_empty(self);
  Py_CLEAR(self->host);
  Py_CLEAR(self->slow);
  Py_CLEAR(self->record);
  return 0;
}

static Py_ssize_t table_length(Table *self) { return (Py_ssize_t)self->used; }

static PyObject *table_reset(Table *self, PyObject *ignored) {
  table_empty(self);
  Py_RETURN_NONE;
}

static PyMethodDef table_methods[] = {{"clear", (PyCFunction)table_reset, METH_NOARGS, "Forget all calls."}, {NULL}};
static PySequenceMethods table_sequence = {.sq_length = (lenfunc)table_length};

static PyTypeObject TableType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "tilewright.runtime._native.Table",
    .tp_basicsize = sizeof(Table),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)table_init,
    .tp_dealloc = deallocate,
    .tp_traverse = (traverseproc)table_traverse,
    .tp_clear = (inquiry)table_clear,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Table, call),
    .tp_methods = table_methods,
    .tp_as_sequence = &table_sequence,
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, NULL};

PyMODINIT_FUNC PyInit__native(void) {
  name_requires_grad = PyUnicode_InternFromString("requires_grad");
  name_cuda_stream = PyUnicode_InternFromString("cuda_stream");
  name_stream = PyUnicode_InternFromString("stream");
  PyObject *module = PyModule_Create(&definition);
  if (!module || PyModule_AddIntConstant(module, "VERSION", VERSION) || PyModule_AddType(module, &HostType) || PyModule_AddType(module, &ProgramType) ||
      PyModule_AddType(module, &TableType))
    return NULL;
  return module;
}
