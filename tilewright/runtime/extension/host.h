/* What calls go through: torch's functions, the driver's, and what torch does with operators in a thread. */
#pragma once
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

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
/* CUlaunchConfig, and the CUlaunchAttribute of launches that may begin while the one before them in the stream runs */
typedef struct { int id, pad, value[16]; } LaunchAttribute;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream;
  const LaunchAttribute *attributes;
  unsigned attribute_count;
} LaunchConfig;
typedef int (*LaunchEarly)(const LaunchConfig *, void *, void **, void **);
typedef int (*EncodeMap)(void *, int, unsigned, void *, const uint64_t *, const uint64_t *, const uint32_t *,
                         const uint32_t *, int, int, int, int);
typedef int (*GetContext)(void **);

/* --- Host: what calls go through ------------------------------------------------------------------ */

typedef struct {
  PyObject_HEAD
  PyObject *capsule, *types, *allocate, *gradients, *plain, *quiet, *harmless, *negated;
  PyObject *forward;       /* attributes of torch.autograd.forward_ad, which knows of no function to ask */
  Exchange *exchange;
  LaunchKernel launch;
  LaunchEarly launch_early;
  EncodeMap encode;
  GetContext context;
  int device_type;
  void *library;           /* that defines the dispatcher's state of a thread */
  PyObject *state_name;
  uint64_t allowed[2];     /* bits of that state that may differ from a thread's first */
} Host;

static _Thread_local uint64_t *dispatch_state;
static PyObject *name_requires_grad, *name_cuda_stream, *name_stream, *name_level;

static int host_init(Host *self, PyObject *args, PyObject *keywords) {
  static char *names[] = {"exchange", "types",       "allocate", "gradients",    "plain",  "quiet",   "harmless", "negated",
                          "forward",  "device_type", "launch",   "launch_early", "encode", "context", "library",  "state",
                          "allowed",  NULL};
  PyObject *capsule, *types, *allocate, *gradients, *plain, *quiet, *harmless, *negated, *forward, *state;
  unsigned long long launch, early, encode, context, included, excluded;
  const char *library;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO!OOOO!OOO!iKKKKzO(KK)", names, &capsule, &PyTuple_Type, &types,
                                   &allocate, &gradients, &plain, &PyTuple_Type, &quiet, &harmless, &negated,
                                   &PyDict_Type, &forward, &self->device_type, &launch, &early, &encode, &context,
                                   &library, &state, &included, &excluded))
    return -1;
  Exchange *exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!exchange) return -1;
  if (exchange->version.major != 1 || !exchange->tensor_of || !exchange->stream_of) {
    PyErr_SetString(PyExc_ValueError, "the exchange functions are of another version of DLPack");
    return -1;
  }
  self->exchange = exchange;
  self->launch = (LaunchKernel)(uintptr_t)launch;
  self->launch_early = (LaunchEarly)(uintptr_t)early;
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
  Py_XSETREF(self->harmless, Py_NewRef(harmless));
  Py_XSETREF(self->negated, Py_NewRef(negated));
  Py_XSETREF(self->forward, Py_NewRef(forward));
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
  Py_VISIT(self->harmless);
  Py_VISIT(self->negated);
  Py_VISIT(self->forward);
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
  Py_CLEAR(self->harmless);
  Py_CLEAR(self->negated);
  Py_CLEAR(self->forward);
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

/* Whether tensors may have tangents: the level of forward-mode differentiation, -1 outside. */
static int host_differentiates(Host *host) {
  PyObject *level = PyDict_GetItemWithError(host->forward, name_level);
  return level && PyLong_CheckExact(level) && PyLong_AsLong(level) >= 0;
}

/* Whether nothing watches or transforms calls of operators in this thread. */
static int host_plain(Host *host) {
  if (host_differentiates(host)) return 0;
  uint64_t *state = host_state(host);
  if (state) {
    if ((state[0] & ~host->allowed[0]) | (state[1] & ~host->allowed[1])) return 0;
  } else {
    int answer = is_false(host->plain);
    if (answer != 1) return answer;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(host->quiet); i++) {
    int answer = is_false(PyTuple_GET_ITEM(host->quiet, i));
    if (answer == 0) answer = is_false(host->harmless);
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
