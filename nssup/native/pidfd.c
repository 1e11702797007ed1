/* pidfd.c - the extension nssup._pidfd: what custody needs of pidfds and Python does not have.
 *
 * Source: name_to_handle_at(2), open_by_handle_at(2) (pidfs has handles since Linux 6.14), pidfd_getfd(2).
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

enum { HANDLE_MAX = 56 };

struct handle {
	struct file_handle head;
	unsigned char identity[HANDLE_MAX];
};

PyDoc_STRVAR(handle_doc, "handle(pidfd, /) -> bytes\n\nThe file handle of a pidfd: type (int32) and identity. Raises OSError.");

static PyObject *handle_py(PyObject *self, PyObject *args)
{
	(void)self;
	int pidfd, mount_id;
	struct handle h = {.head = {.handle_bytes = HANDLE_MAX}};

	if (!PyArg_ParseTuple(args, "i", &pidfd))
		return NULL;
	if (name_to_handle_at(pidfd, "", &h.head, &mount_id, AT_EMPTY_PATH) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	unsigned char out[sizeof h.head.handle_type + HANDLE_MAX];
	memcpy(out, &h.head.handle_type, sizeof h.head.handle_type);
	memcpy(out + sizeof h.head.handle_type, h.head.f_handle, h.head.handle_bytes);
	return PyBytes_FromStringAndSize((char *)out, (Py_ssize_t)(sizeof h.head.handle_type + h.head.handle_bytes));
}

PyDoc_STRVAR(reopen_doc,
	     "reopen(handle, pidfd, /) -> int\n\nA pidfd of the process that handle was taken of; pidfd: any, of this host.\n"
	     "Raises OSError: ESTALE when it is gone.");

static PyObject *reopen_py(PyObject *self, PyObject *args)
{
	(void)self;
	const char *data;
	Py_ssize_t length;
	int mount;
	struct handle h = {.head = {.handle_bytes = 0}};

	if (!PyArg_ParseTuple(args, "y#i", &data, &length, &mount))
		return NULL;
	Py_ssize_t identity = length - (Py_ssize_t)sizeof h.head.handle_type;
	if (identity < 0 || identity > HANDLE_MAX) {
		errno = EINVAL;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	h.head.handle_bytes = (unsigned int)identity;
	memcpy(&h.head.handle_type, data, sizeof h.head.handle_type);
	memcpy(h.head.f_handle, data + sizeof h.head.handle_type, (size_t)identity);
	int fd = open_by_handle_at(mount, &h.head, O_CLOEXEC);
	return fd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(fd);
}

PyDoc_STRVAR(getfd_doc, "getfd(pidfd, number, /) -> int\n\nA copy of that process's descriptor, close-on-exec. Raises OSError.");

static PyObject *getfd_py(PyObject *self, PyObject *args)
{
	(void)self;
	int pidfd, number;

	if (!PyArg_ParseTuple(args, "ii", &pidfd, &number))
		return NULL;
	long fd = syscall(SYS_pidfd_getfd, pidfd, number, 0);
	return fd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(fd);
}

static PyMethodDef methods[] = {
	{"handle", handle_py, METH_VARARGS, handle_doc},
	{"reopen", reopen_py, METH_VARARGS, reopen_doc},
	{"getfd", getfd_py, METH_VARARGS, getfd_doc},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT, "nssup._pidfd", "Handles and descriptors by pidfd; see nssup.custody.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__pidfd(void);
PyMODINIT_FUNC PyInit__pidfd(void)
{
	return PyModule_Create(&module);
}
