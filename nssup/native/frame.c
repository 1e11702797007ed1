/* frame.c - the extension nssup._frame: framing.h for nssup.framing. */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include "framing.h"

enum { WORTH_LETTING_GO = 16 * 1024 }; /* bytes of data: below, another thread gains less than the change costs */

PyDoc_STRVAR(frame_doc,
	     "frame(out, position, data, start, stop, head, offset, held, cut, ending, /) -> (position, start, offset, held, cut)\n\n"
	     "Frames data[start:stop], which follows held, into out from position on, as far as there is room; head: each record's begin, up\n"
	     "to its offset. ending: the stream is over then. All of it is done when the new start is stop, and, if ending, nothing is held.\n"
	     "Raises ValueError when out has no room for a single record, or a number is out of range.");

static PyObject *frame_py(PyObject *self, PyObject *args)
{
	(void)self;
	Py_buffer out, data;
	const char *head, *held;
	Py_ssize_t position, start, stop, head_size, held_size;
	unsigned long long offset;
	int cut, ending;
	struct framing f;

	if (!PyArg_ParseTuple(args, "w*ny*nny#Ky#pp", &out, &position, &data, &start, &stop, &head, &head_size, &offset, &held, &held_size, &cut, &ending))
		return NULL;
	PyObject *result = NULL;
	if (position < 0 || position > out.len || start < 0 || stop < start || stop > data.len || held_size > PART ||
	    out.len < head_size || out.len - head_size < RECORD_MOST) {
		PyErr_SetString(PyExc_ValueError, "frame: out of range");
		goto done;
	}
	f.head = (const uint8_t *)head;
	f.head_size = (size_t)head_size;
	f.out = (uint8_t *)out.buf + position;
	f.end = (uint8_t *)out.buf + out.len;
	f.at = (const uint8_t *)data.buf + start;
	f.stop = (const uint8_t *)data.buf + stop;
	f.offset = offset;
	f.held_size = (size_t)held_size;
	f.cut = cut;
	memcpy(f.held, held, f.held_size);
	if (stop - start < WORTH_LETTING_GO) {
		frame(&f, ending);
	} else {
		Py_BEGIN_ALLOW_THREADS
		frame(&f, ending);
		Py_END_ALLOW_THREADS
	}
	result = Py_BuildValue("nnKy#O", (Py_ssize_t)(f.out - (uint8_t *)out.buf), (Py_ssize_t)(f.at - (const uint8_t *)data.buf),
			       (unsigned long long)f.offset, (const char *)f.held, (Py_ssize_t)f.held_size, f.cut ? Py_True : Py_False);
done:
	PyBuffer_Release(&data);
	PyBuffer_Release(&out);
	return result;
}

PyDoc_STRVAR(is_object_doc, "is_object(line, /) -> bool\n\nAs nssup.lines.is_object.");

static PyObject *is_object_py(PyObject *self, PyObject *args)
{
	(void)self;
	const char *line;
	Py_ssize_t size;

	if (!PyArg_ParseTuple(args, "y#", &line, &size))
		return NULL;
	return PyBool_FromLong(is_object((const uint8_t *)line, (size_t)size));
}

static PyMethodDef methods[] = {
	{"frame", frame_py, METH_VARARGS, frame_doc},
	{"is_object", is_object_py, METH_VARARGS, is_object_doc},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT, "nssup._frame", "Bytes of a stream into records; see nssup.framing.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__frame(void);
PyMODINIT_FUNC PyInit__frame(void)
{
	PyObject *made = PyModule_Create(&module);
	if (made && PyModule_AddIntConstant(made, "RECORD_MOST", RECORD_MOST) < 0)
		Py_CLEAR(made);
	return made;
}
