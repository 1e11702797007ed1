/* framing.h under sanitizers. Reads its job from stdin: the size of out, then for each read its size and its bytes; 0xffffffff is the
 * end of the stream. Writes the records. All memory is of the exact size, so that a byte too far is found. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>

#include "../nssup/native/framing.h"

static uint32_t number(void)
{
	uint32_t value;
	if (fread(&value, sizeof value, 1, stdin) != 1)
		exit(0);
	return value;
}

int main(void)
{
	static const char head[] = "{\"offset\":";
	struct framing f = {.offset = 0};
	size_t size = sizeof head - 1 + RECORD_MOST + number();
	uint8_t *out = malloc(size);
	uint8_t *own_head = malloc(sizeof head - 1);

	if (out == NULL || own_head == NULL)
		return 1;
	memcpy(own_head, head, sizeof head - 1);
	f.head = own_head;
	f.head_size = sizeof head - 1;
	for (;;) {
		uint32_t length = number();
		bool ending = length == 0xffffffff, all;
		uint8_t *data = malloc(ending ? 0 : length);
		if (ending)
			length = 0;
		if (length && (data == NULL || fread(data, 1, length, stdin) != length))
			return 1;
		f.at = data;
		f.stop = length ? data + length : data;
		do {
			f.out = out;
			f.end = out + size;
			all = frame(&f, ending);
			fwrite(out, 1, (size_t)(f.out - out), stdout);
		} while (!all);
		free(data);
	}
}
