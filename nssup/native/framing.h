/* framing.h - bytes of one stream -> log records, as nssup/lines.py does it, byte for byte: lines.py says what a record is.
 *
 * No Python, no memory of its own, no system call. Reads nothing outside [data, data + size) and held, writes nothing outside [out, end).
 */
#ifndef NSSUP_FRAMING_H
#define NSSUP_FRAMING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
	PART = 16 * 1024, /* lines.PART */
	MAX_DEPTH = 64,
	MAX_DIGITS = 300,
	STEP = 32, /* bytes looked at at once */
	/* What one record may need beside its head: each byte as \u00xx, the same again as base64, offset, keys, marks. */
	RECORD_MOST = 6 * PART + 4 * (PART / 3 + 1) + 128,
};

struct framing {
	const uint8_t *head; /* the record up to and with `"offset":` */
	size_t head_size;
	uint8_t *out, *end; /* records go to out, which moves on */
	const uint8_t *at, *stop; /* what of the data is not in records or held; at moves on */
	uint64_t offset; /* bytes of the stream that are in records */
	size_t held_size;
	bool cut; /* parts of the line that held continues are in records */
	uint8_t held[PART + 1]; /* the begin of an unfinished line */
};

/* --- characters -------------------------------------------------------------------------------------------------- */

/* How many of the size bytes at s are one well-formed character; 0: none, and *bad is how many one U+FFFD stands for. size > 0. */
static inline size_t character(const uint8_t *s, size_t size, size_t *bad)
{
	uint8_t low = 0x80, high = 0xbf;
	size_t more;

	*bad = 1;
	if (s[0] < 0x80)
		return 1;
	if (s[0] < 0xc2 || s[0] > 0xf4)
		return 0;
	if (s[0] < 0xe0) {
		more = 1;
	} else if (s[0] < 0xf0) {
		more = 2;
		if (s[0] == 0xe0)
			low = 0xa0;
		else if (s[0] == 0xed)
			high = 0x9f;
	} else {
		more = 3;
		if (s[0] == 0xf0)
			low = 0x90;
		else if (s[0] == 0xf4)
			high = 0x8f;
	}
	for (size_t i = 1; i <= more; i++) {
		if (i == size || s[i] < low || s[i] > high) {
			*bad = i;
			return 0;
		}
		low = 0x80, high = 0xbf;
	}
	return more + 1;
}

static inline uint8_t *escape(uint8_t *out, uint8_t c)
{
	static const char hex[] = "0123456789abcdef", brief[] = "........btn.fr..";

	*out++ = '\\';
	if (c == '"' || c == '\\') {
		*out++ = c;
	} else if (c >= 8 && c < 14 && c != 11) {
		*out++ = (uint8_t)brief[c];
	} else {
		memcpy(out, "u00", 3);
		out[3] = (uint8_t)hex[c >> 4];
		out[4] = (uint8_t)hex[c & 15];
		out += 5;
	}
	return out;
}

static inline bool is_plain(uint8_t c)
{
	return c >= 0x20 && c < 0x80 && c != '"' && c != '\\';
}

/* --- JSON objects (lines.is_object) ------------------------------------------------------------------------------ */

struct json {
	const uint8_t *at, *stop;
};

static inline bool is_digit(uint8_t c)
{
	return c >= '0' && c <= '9';
}

static bool json_string(struct json *j) /* behind its first quote */
{
	size_t bad;

	while (j->at < j->stop) {
		uint8_t c = *j->at;
		if (is_plain(c)) {
			j->at++;
		} else if (c == '"') {
			j->at++;
			return true;
		} else if (c == '\\') {
			unsigned code[2] = {0, 0};
			if (j->stop - j->at < 2)
				return false;
			if (j->at[1] != 'u') {
				if (j->at[1] == 0 || strchr("\"\\/bfnrt", j->at[1]) == NULL)
					return false;
				j->at += 2;
				continue;
			}
			for (int half = 0; half < 2; half++) {
				if (j->stop - j->at < 6 || j->at[0] != '\\' || j->at[1] != 'u')
					return false;
				for (int i = 2; i < 6; i++) {
					uint8_t d = j->at[i];
					unsigned value = is_digit(d) ? d - (unsigned)'0' : (d | 32) >= 'a' && (d | 32) <= 'f' ? (d | 32u) - 'a' + 10 : 16;
					if (value == 16)
						return false;
					code[half] = code[half] << 4 | value;
				}
				j->at += 6;
				if (half == 0 && (code[0] < 0xd800 || code[0] > 0xdfff))
					break;
				if (half == 0 ? code[0] > 0xdbff : code[1] < 0xdc00 || code[1] > 0xdfff)
					return false; /* half of a pair alone */
			}
		} else {
			size_t size = c < 0x80 ? 0 : character(j->at, (size_t)(j->stop - j->at), &bad);
			if (size == 0)
				return false;
			j->at += size;
		}
	}
	return false;
}

/* Whether digits, of which the first is not 0, times 10^(1 - how many there are) * 10^308 is out of a double's range: 2^1024 - 2^970 on. */
static bool is_beyond(const uint8_t *digits, const uint8_t *stop)
{
	static const char limit[] =
		"17976931348623158079372897140530341507993413271003782693617377898044496829276475094664901797758720709633028641"
		"66928879109465555478519404026306574886715058206819089020007083836762738548458177115317644757302700698555713669"
		"59622842914819860834936475292719074168444365510704342711559699508093042880177904174497792";
	const char *l = limit;

	for (; digits < stop && *l; digits++) {
		if (*digits == '.')
			continue;
		if (*digits != (uint8_t)*l)
			return *digits > (uint8_t)*l;
		l++;
	}
	for (; *l; l++)
		if (*l != '0')
			return false;
	return true;
}

static bool json_number(struct json *j)
{
	const uint8_t *p = j->at, *stop = j->stop, *first, *point = NULL, *digits;

	if (p < stop && *p == '-')
		p++;
	if (p == stop || !is_digit(*p))
		return false;
	digits = p;
	if (*p == '0')
		p++;
	else
		while (p < stop && is_digit(*p))
			p++;
	point = p;
	if (p < stop && *p == '.') {
		const uint8_t *fraction = ++p;
		while (p < stop && is_digit(*p))
			p++;
		if (p == fraction)
			return false;
	}
	const uint8_t *mantissa = p;
	int64_t exponent = 0;
	if (p < stop && (*p == 'e' || *p == 'E')) {
		bool minus = false;
		p++;
		if (p < stop && (*p == '+' || *p == '-'))
			minus = *p++ == '-';
		if (p == stop || !is_digit(*p))
			return false;
		for (; p < stop && is_digit(*p); p++)
			if (exponent < 1000000)
				exponent = exponent * 10 + (*p - '0');
		if (minus)
			exponent = -exponent;
	}
	j->at = p;
	for (first = digits; first < mantissa && (*first == '0' || *first == '.'); first++)
		;
	if (first == mantissa)
		return true; /* zero */
	exponent += first < point ? point - first - 1 : point - first; /* of ten, when the first digit that counts stands before the point */
	return exponent < 308 || (exponent == 308 && !is_beyond(first, mantissa));
}

static inline void json_blank(struct json *j)
{
	while (j->at < j->stop && (*j->at == ' ' || *j->at == '\t' || *j->at == '\r' || *j->at == '\n'))
		j->at++;
}

static inline bool json_word(struct json *j, const char *word, size_t size)
{
	if ((size_t)(j->stop - j->at) < size || memcmp(j->at, word, size) != 0)
		return false;
	j->at += size;
	return true;
}

static bool json_key(struct json *j)
{
	json_blank(j);
	if (j->at == j->stop || *j->at++ != '"' || !json_string(j))
		return false;
	json_blank(j);
	return j->at < j->stop && *j->at++ == ':';
}

/* One value and no more, nested no deeper than MAX_DEPTH. */
static bool json_value(struct json *j)
{
	uint64_t objects = 0; /* bit n: level n is an object, no array */
	int depth = 0;

	for (;;) {
		bool open = false;
		json_blank(j);
		if (j->at == j->stop)
			return false;
		switch (*j->at) {
		case '{':
		case '[':
			if (depth == MAX_DEPTH)
				return false;
			objects = *j->at == '{' ? objects | UINT64_C(1) << depth : objects & ~(UINT64_C(1) << depth);
			depth++;
			j->at++;
			open = true;
			break;
		case '"':
			j->at++;
			if (!json_string(j))
				return false;
			break;
		case 't':
			if (!json_word(j, "true", 4))
				return false;
			break;
		case 'f':
			if (!json_word(j, "false", 5))
				return false;
			break;
		case 'n':
			if (!json_word(j, "null", 4))
				return false;
			break;
		default:
			if (!json_number(j))
				return false;
		}
		for (;;) { /* behind a value, or behind an opening bracket */
			if (depth == 0)
				return true;
			bool object = objects >> (depth - 1) & 1;
			json_blank(j);
			if (j->at == j->stop)
				return false;
			if (*j->at == (object ? '}' : ']')) {
				j->at++;
				depth--;
				open = false;
				continue;
			}
			if (!open && *j->at++ != ',')
				return false;
			if (object && !json_key(j))
				return false;
			break;
		}
	}
}

static bool is_object(const uint8_t *line, size_t size)
{
	struct json j = {line, line + size};

	if (size < 2 || line[0] != '{' || line[size - 1] != '}' || !json_value(&j) || j.at != j.stop)
		return false;
	if (size > MAX_DIGITS) {
		/* Every MAX_DIGITS bytes we come by each run that is too long. */
		for (size_t at = MAX_DIGITS; at < size; at += MAX_DIGITS) {
			if (!is_digit(line[at]))
				continue;
			size_t from = at, to = at + 1;
			while (from > 0 && is_digit(line[from - 1]))
				from--;
			while (to < size && is_digit(line[to]))
				to++;
			if (to - from > MAX_DIGITS)
				return false;
		}
	}
	return true;
}

/* --- records ----------------------------------------------------------------------------------------------------- */

static inline uint8_t *decimal(uint8_t *out, uint64_t value)
{
	uint8_t digits[20];
	size_t i = sizeof digits;

	while (value >= 100) {
		uint64_t rest = value / 100, pair = value - rest * 100;
		digits[--i] = (uint8_t)('0' + pair % 10);
		digits[--i] = (uint8_t)('0' + pair / 10);
		value = rest;
	}
	if (value >= 10) {
		digits[--i] = (uint8_t)('0' + value % 10);
		value /= 10;
	}
	digits[--i] = (uint8_t)('0' + value);
	memcpy(out, digits + i, sizeof digits - i);
	return out + sizeof digits - i;
}

static inline uint8_t *text(uint8_t *out, const char *what, size_t size)
{
	memcpy(out, what, size);
	return out + size;
}
#define TEXT(out, what) text(out, what, sizeof what - 1)

static inline uint8_t *begin(const struct framing *f)
{
	memcpy(f->out, f->head, f->head_size);
	return decimal(f->out + f->head_size, f->offset);
}

static uint8_t *base64(uint8_t *out, const uint8_t *s, size_t size)
{
	static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

	for (; size > 0; s += 3) {
		uint32_t bits = (uint32_t)s[0] << 16 | (size > 1 ? (uint32_t)s[1] << 8 : 0) | (size > 2 ? s[2] : 0u);
		*out++ = (uint8_t)digit[bits >> 18];
		*out++ = (uint8_t)digit[bits >> 12 & 63];
		*out++ = size > 1 ? (uint8_t)digit[bits >> 6 & 63] : '=';
		*out++ = size > 2 ? (uint8_t)digit[bits & 63] : '=';
		size -= size < 3 ? size : 3;
	}
	return out;
}

enum mark { WHOLE, PARTIAL, NO_NEWLINE };

/* The record of a line or a part of one; size <= PART. For what is rare. */
static void record(struct framing *f, const uint8_t *part, size_t size, enum mark mark)
{
	uint8_t *out = TEXT(begin(f), ",\"msg\":\"");
	bool valid = true;

	for (size_t i = 0, bad; i < size;) {
		size_t length = character(part + i, size - i, &bad);
		if (length == 1 && !is_plain(part[i])) {
			out = escape(out, part[i++]);
		} else if (length > 0) {
			memcpy(out, part + i, length);
			out += length;
			i += length;
		} else {
			valid = false;
			out = TEXT(out, "\xef\xbf\xbd");
			i += bad;
		}
	}
	*out++ = '"';
	if (mark == PARTIAL)
		out = TEXT(out, ",\"partial\":true");
	else if (mark == NO_NEWLINE)
		out = TEXT(out, ",\"nl\":false");
	if (!valid)
		out = TEXT(base64(TEXT(out, ",\"msg_b64\":\""), part, size), "\"");
	f->out = TEXT(out, "}\n");
	f->offset += size + (mark == WHOLE);
}

static void data_record(struct framing *f, const uint8_t *line, size_t size)
{
	uint8_t *out = TEXT(begin(f), ",\"data\":");

	memcpy(out, line, size);
	f->out = TEXT(out + size, "}\n");
	f->offset += size + 1;
}

static inline bool has_room(const struct framing *f)
{
	return (size_t)(f->end - f->out) >= f->head_size + RECORD_MOST;
}

/* Where the part that begins at line ends; more than PART bytes of it are there. */
static inline size_t cut(const uint8_t *line)
{
	for (size_t at = PART; at > PART - 4; at--)
		if ((line[at] & 0xc0) != 0x80)
			return at;
	return PART;
}

/* One line, or what there is of it, from held and the data up to newline (NULL: there is none). False: no room. */
static bool odd_line(struct framing *f, const uint8_t *newline)
{
	const uint8_t *stop = newline ? newline : f->stop;

	for (;;) {
		size_t rest = (size_t)(stop - f->at), size = f->held_size + rest;
		const uint8_t *line = f->at;

		if (newline == NULL && size <= PART) {
			if (rest)
				memcpy(f->held + f->held_size, f->at, rest);
			f->held_size = size;
			f->at = stop;
			return true;
		}
		if (!has_room(f))
			return false;
		if (f->held_size) {
			size_t fill = size <= PART ? rest : PART + 1 - f->held_size;
			memcpy(f->held + f->held_size, f->at, fill);
			line = f->held;
		}
		if (size <= PART) {
			if (!f->cut && is_object(line, size))
				data_record(f, line, size);
			else
				record(f, line, size, WHOLE);
			f->cut = false;
			f->held_size = 0;
			f->at = newline + 1;
			return true;
		}
		size_t done = cut(line);
		record(f, line, done, PARTIAL);
		f->cut = true;
		if (done < f->held_size) {
			f->held_size -= done;
			memmove(f->held, f->held + done, f->held_size);
		} else {
			f->at += done - f->held_size;
			f->held_size = 0;
		}
	}
}

/* How many bytes at the begin of p are plain, after copying STEP bytes from p to out; STEP: all of them. */
#if defined(__x86_64__)
__attribute__((target("avx2"))) static inline unsigned copy_plain_avx2(uint8_t *out, const uint8_t *p)
{
	__m256i v = _mm256_loadu_si256((const __m256i *)(const void *)p);
	_mm256_storeu_si256((__m256i *)(void *)out, v);
	__m256i odd = _mm256_or_si256(_mm256_cmpeq_epi8(v, _mm256_set1_epi8('"')), _mm256_cmpeq_epi8(v, _mm256_set1_epi8('\\')));
	odd = _mm256_or_si256(odd, _mm256_cmpeq_epi8(_mm256_min_epu8(v, _mm256_set1_epi8(31)), v));
	unsigned mask = (unsigned)_mm256_movemask_epi8(_mm256_or_si256(odd, v)); /* 0x80 and above have the bit anyway */
	return mask ? (unsigned)__builtin_ctz(mask) : STEP;
}

static inline unsigned copy_plain_sse2(uint8_t *out, const uint8_t *p)
{
	unsigned mask = 0;
	for (unsigned half = 0; half < 2; half++) {
		__m128i v = _mm_loadu_si128((const __m128i *)(const void *)(p + half * 16));
		_mm_storeu_si128((__m128i *)(void *)(out + half * 16), v);
		__m128i odd = _mm_or_si128(_mm_cmpeq_epi8(v, _mm_set1_epi8('"')), _mm_cmpeq_epi8(v, _mm_set1_epi8('\\')));
		odd = _mm_or_si128(odd, _mm_cmpeq_epi8(_mm_min_epu8(v, _mm_set1_epi8(31)), v));
		mask |= (unsigned)_mm_movemask_epi8(_mm_or_si128(odd, v)) << half * 16;
	}
	return mask ? (unsigned)__builtin_ctz(mask) : STEP;
}
#endif

static inline unsigned copy_plain_any(uint8_t *out, const uint8_t *p)
{
	unsigned count = 0;
	memcpy(out, p, STEP);
	while (count < STEP && is_plain(p[count]))
		count++;
	return count;
}

/* Whole lines up to last, the last newline there is, as long as they are short, of good characters and there is room. */
#define DEFINE_SHORT_LINES(name, attributes, copy_plain)                                                                                \
	attributes static void name(struct framing *f, const uint8_t *last)                                                             \
	{                                                                                                                               \
		while (f->at <= last && has_room(f)) {                                                                                  \
			const uint8_t *p = f->at, *stop = last - f->at > PART ? f->at + PART + 1 : last + 1;                            \
			uint8_t *out = TEXT(begin(f), ",\"msg\":\"");                                                                   \
			size_t bad, size;                                                                                               \
			if (*p == '{') {                                                                                                \
				const uint8_t *newline = memchr(p, '\n', (size_t)(stop - p));                                           \
				if (newline == NULL)                                                                                    \
					return;                                                                                         \
				if (is_object(p, (size_t)(newline - p))) {                                                              \
					data_record(f, p, (size_t)(newline - p));                                                       \
					f->at = newline + 1;                                                                            \
					continue;                                                                                       \
				}                                                                                                       \
			}                                                                                                               \
			for (;;) {                                                                                                      \
				if (stop - p >= STEP) {                                                                                 \
					unsigned count = copy_plain(out, p);                                                            \
					p += count;                                                                                     \
					out += count;                                                                                   \
					if (count == STEP)                                                                              \
						continue;                                                                               \
				} else {                                                                                                \
					while (p < stop && is_plain(*p))                                                                \
						*out++ = *p++;                                                                          \
					if (p == stop)                                                                                  \
						return;                                                                                 \
				}                                                                                                       \
				if (*p == '\n')                                                                                         \
					break;                                                                                          \
				if (*p < 0x80) {                                                                                        \
					out = escape(out, *p++);                                                                        \
					continue;                                                                                       \
				}                                                                                                       \
				do {                                                                                                    \
					size = character(p, (size_t)(stop - p), &bad);                                                  \
					if (size == 0)                                                                                  \
						return;                                                                                 \
					memcpy(out, p, size);                                                                           \
					out += size;                                                                                    \
					p += size;                                                                                      \
				} while (p < stop && *p >= 0x80);                                                                       \
				if (p == stop)                                                                                          \
					return;                                                                                         \
			}                                                                                                               \
			f->offset += (uint64_t)(p - f->at) + 1;                                                                         \
			f->out = TEXT(out, "\"}\n");                                                                                    \
			f->at = p + 1;                                                                                                  \
		}                                                                                                                       \
	}

DEFINE_SHORT_LINES(short_lines_any, __attribute__((unused)), copy_plain_any)
#if defined(__x86_64__)
DEFINE_SHORT_LINES(short_lines_sse2, __attribute__((unused)), copy_plain_sse2)
DEFINE_SHORT_LINES(short_lines_avx2, __attribute__((unused, target("avx2"))), copy_plain_avx2)
#endif

#ifndef SHORT_LINES /* a test asks for each of them by name */
#if defined(__x86_64__)
#define SHORT_LINES(f, last) (__builtin_cpu_supports("avx2") ? short_lines_avx2(f, last) : short_lines_sse2(f, last))
#else
#define SHORT_LINES short_lines_any
#endif
#endif

/* As many records of the data as there is room for. True: all of it is in records or held. ending: the stream is over behind it. */
static bool frame(struct framing *f, bool ending)
{
	const uint8_t *last = f->at < f->stop ? memrchr(f->at, '\n', (size_t)(f->stop - f->at)) : NULL;

	while (last && f->at <= last) {
		if (f->held_size == 0 && !f->cut) {
			const uint8_t *before = f->at;
			SHORT_LINES(f, last);
			if (f->at != before)
				continue;
		}
		if (!odd_line(f, memchr(f->at, '\n', (size_t)(last + 1 - f->at))))
			return false;
	}
	if (f->at < f->stop && !odd_line(f, NULL))
		return false;
	if (ending && f->held_size) {
		if (!has_room(f))
			return false;
		record(f, f->held, f->held_size, NO_NEWLINE);
		f->held_size = 0;
		f->cut = false;
	}
	return true;
}

#endif
