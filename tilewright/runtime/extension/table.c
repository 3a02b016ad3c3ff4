/* Repeated launches without Python: see ../native.py, which also says what is optional.

   A `Table` is a callable in front of a Python function. It looks at its arguments (tensors through DLPack's exchange
   functions, numbers, names), and where it has seen their like twice it has a `Program`: kernels to start, the bytes of
   their arguments, and where in those bytes addresses and numbers of the present call belong. Everything else goes to
   the Python function. All of it holds the interpreter's lock, but for the starts themselves. */
#include "key.h"
#include <structmember.h>

#define VERSION 8   /* of what it offers; native.py asks for the same */

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
  PyObject *slow, *record, *recorded;   /* recorded: instead of slow where gradients are recorded; None: slow too */
  uint64_t numbers;    /* positions whose numbers are arguments of kernels */
  int launches;        /* the first two arguments are a grid and a device, and the keyword `stream` is one */
  size_t size, used, most;
  unsigned long long calls, repeated;
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

/* The truth of a new reference, -1 if it is NULL. */
static int truth_of(PyObject *object) {
  int truth = object ? PyObject_IsTrue(object) : -1;
  Py_XDECREF(object);
  return truth;
}

/* Where a call belongs: to a program, to what records gradients, or to Python; -1 with an error set. */
enum { PROGRAM, GRADIENTS, PYTHON };

static int belongs(Host *host, const Key *key, PyObject *const *args) {
  int gradients = 0, off = is_false(host->gradients);
  if (off < 0) return -1;
  for (uint64_t rest = key->tensors; rest; rest &= rest - 1) {
    PyObject *tensor = args[__builtin_ctzll(rest)];
    int negated = truth_of(PyObject_CallOneArg(host->negated, tensor));   /* what is in memory has the other sign */
    if (negated) return negated < 0 ? -1 : PYTHON;
    if (off || gradients) continue;
    if ((gradients = truth_of(PyObject_GetAttr(tensor, name_requires_grad))) < 0) return -1;
  }
  return gradients ? GRADIENTS : PROGRAM;
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
  self->calls++;
  /* a grid that is a function may give another one each time */
  int plain = self->launches ? count >= 2 && (PyTuple_Check(args[0]) || PyLong_Check(args[0])) : host_plain(self->host);
  if (plain < 0) return NULL;
  if (!plain || table_key(self, &key, args, count, names, &stream)) goto slow;
  if (!self->launches) {
    int place = belongs(self->host, &key, args);
    if (place < 0) return NULL;
    if (place == GRADIENTS && self->recorded != Py_None) return PyObject_Vectorcall(self->recorded, args, flags, names);
    if (place != PROGRAM) goto slow;
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
  PyObject *result = program_run(self->host, (Program *)program, key.values, key.value_count, stream);
  Py_DECREF(program);
  if (result) return self->repeated++, result;
slow:
  return PyObject_Vectorcall(self->slow, args, flags, names);
}

static int table_init(Table *self, PyObject *args, PyObject *keywords) {
  static char *names[] = {"host", "slow", "record", "recorded", "launches", "numbers", "most", NULL};
  PyObject *host, *slow, *record, *recorded;
  unsigned long long numbers;
  Py_ssize_t most;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!OOOpKn", names, &HostType, &host, &slow, &record, &recorded,
                                   &self->launches, &numbers, &most))
    return -1;
  if (!((Host *)host)->exchange) return PyErr_SetString(PyExc_ValueError, "the host has not been initialized"), -1;
  self->call = table_call;
  self->numbers = numbers;
  self->most = most;
  Py_XSETREF(self->host, (Host *)Py_NewRef(host));
  Py_XSETREF(self->slow, Py_NewRef(slow));
  Py_XSETREF(self->record, Py_NewRef(record));
  Py_XSETREF(self->recorded, Py_NewRef(recorded));
  return 0;
}

static int table_traverse(Table *self, visitproc visit, void *arg) {
  Py_VISIT(self->host);
  Py_VISIT(self->slow);
  Py_VISIT(self->record);
  Py_VISIT(self->recorded);
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
  Py_CLEAR(self->recorded);
  return 0;
}

static Py_ssize_t table_length(Table *self) { return (Py_ssize_t)self->used; }

static PyObject *table_reset(Table *self, PyObject *ignored) {
  table_empty(self);
  Py_RETURN_NONE;
}

static PyMethodDef table_methods[] = {{"clear", (PyCFunction)table_reset, METH_NOARGS, "Forget all calls."}, {NULL}};
static PyMemberDef table_members[] = {{"calls", T_ULONGLONG, offsetof(Table, calls), READONLY, "All calls so far."},
                                      {"repeated", T_ULONGLONG, offsetof(Table, repeated), READONLY, "Those without Python."},
                                      {NULL}};
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
    .tp_members = table_members,
    .tp_as_sequence = &table_sequence,
};

/* --- Bound: a kernel with a grid and a device ------------------------------------------------------ */

typedef struct {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject *kernel, *grid, *device;
} Bound;

static PyObject *recordings, *name_table, *name_call;

/* Through the kernel's table if it has one, while nothing is recorded; else the Python method `call`. */
static PyObject *bound_call(PyObject *object, PyObject *const *args, size_t flags, PyObject *names) {
  Bound *self = (Bound *)object;
  Py_ssize_t all = PyVectorcall_NARGS(flags) + (names ? PyTuple_GET_SIZE(names) : 0);
  PyObject *given[MOST_VALUES + 2], *result, *table = PyObject_GetAttr(self->kernel, name_table);
  if (!table) return NULL;
  if (Py_TYPE(table) == &TableType && all <= MOST_VALUES && recordings && !PyDict_GET_SIZE(recordings)) {
    given[0] = self->grid, given[1] = self->device;
    memcpy(given + 2, args, all * sizeof *args);
    result = table_call(table, given, PyVectorcall_NARGS(flags) + 2, names);
  } else {
    PyObject *method = PyObject_GetAttr(object, name_call);
    result = method ? PyObject_Vectorcall(method, args, PyVectorcall_NARGS(flags), names) : NULL;
    Py_XDECREF(method);
  }
  Py_DECREF(table);
  return result;
}

static int bound_init(Bound *self, PyObject *args, PyObject *keywords) {
  static char *names[] = {"kernel", "grid", "device", NULL};
  PyObject *kernel, *grid, *device = Py_None;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO|O", names, &kernel, &grid, &device)) return -1;
  self->call = bound_call;
  Py_XSETREF(self->kernel, Py_NewRef(kernel));
  Py_XSETREF(self->grid, Py_NewRef(grid));
  Py_XSETREF(self->device, Py_NewRef(device));
  return 0;
}

static int bound_traverse(Bound *self, visitproc visit, void *arg) {
  Py_VISIT(self->kernel);
  Py_VISIT(self->grid);
  Py_VISIT(self->device);
  return 0;
}

static int bound_clear(Bound *self) {
  Py_CLEAR(self->kernel);
  Py_CLEAR(self->grid);
  Py_CLEAR(self->device);
  return 0;
}

static PyMemberDef bound_members[] = {{"kernel", T_OBJECT_EX, offsetof(Bound, kernel), READONLY, NULL},
                                      {"grid", T_OBJECT_EX, offsetof(Bound, grid), READONLY, NULL},
                                      {"device", T_OBJECT_EX, offsetof(Bound, device), READONLY, NULL},
                                      {NULL}};

static PyTypeObject BoundType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "tilewright.runtime._native.Bound",
    .tp_basicsize = sizeof(Bound),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_BASETYPE,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)bound_init,
    .tp_dealloc = deallocate,
    .tp_traverse = (traverseproc)bound_traverse,
    .tp_clear = (inquiry)bound_clear,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Bound, call),
    .tp_members = bound_members,
};

static PyObject *watch_recordings(PyObject *module, PyObject *dictionary) {
  if (!PyDict_Check(dictionary)) return PyErr_SetString(PyExc_TypeError, "recordings are a dict"), NULL;
  Py_XSETREF(recordings, Py_NewRef(dictionary));
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"watch", watch_recordings, METH_O, "The dict that has an entry for each recording that is under way."}, {NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, functions};

PyMODINIT_FUNC PyInit__native(void) {
  name_requires_grad = PyUnicode_InternFromString("requires_grad");
  name_cuda_stream = PyUnicode_InternFromString("cuda_stream");
  name_stream = PyUnicode_InternFromString("stream");
  name_level = PyUnicode_InternFromString("_current_level");
  name_table = PyUnicode_InternFromString("table");
  name_call = PyUnicode_InternFromString("call");
  PyObject *module = PyModule_Create(&definition);
  if (!module || PyModule_AddIntConstant(module, "VERSION", VERSION) || PyModule_AddType(module, &HostType) ||
      PyModule_AddType(module, &ProgramType) || PyModule_AddType(module, &TableType) || PyModule_AddType(module, &BoundType))
    return Py_XDECREF(module), NULL;
  return module;
}
