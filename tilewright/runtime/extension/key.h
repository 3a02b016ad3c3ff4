/* What a call is known by: the kinds of its tensors, and its other arguments. */
#pragma once
#include "program.h"

#define MOST_WORDS 192
#define MOST_OBJECTS 64

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
      int objects = key->object_count;
      if (PyTuple_Check(item) || PyList_Check(item) || put_value(key, item, 0, &ignored)) return -1;
      /* while Python code runs, the key's objects are kept by the arguments, but a list may lose its own */
      if (PyList_Check(object) && key->object_count > objects) return -1;
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
