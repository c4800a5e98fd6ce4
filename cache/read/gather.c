/* Reads rows of equal size from files into their slots; checks each against the crc32c that follows it in its file.
 *
 * It does the work of the loop in `cache/reader.py` for uncompressed rows in one call, without Python between two rows
 * and without the GIL. `cache/read/gather.py` calls it; if it was not built, the loop in `cache/reader.py` is used.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>

#if defined(__APPLE__)
#define st_changed st_mtimespec
#else
#define st_changed st_mtim
#endif

#if defined(__x86_64__)
#include <nmmintrin.h>
#define WITH_CRC __attribute__((target("sse4.2")))
#define crc_word(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define crc_byte(crc, byte) _mm_crc32_u8((crc), (byte))
int usable(void) { return __builtin_cpu_supports("sse4.2") != 0; }
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32) && !defined(__ARM_BIG_ENDIAN)
#include <arm_acle.h>
#define WITH_CRC
#define crc_word(crc, word) __crc32cd((crc), (word))
#define crc_byte(crc, byte) __crc32cb((crc), (byte))
int usable(void) { return 1; }
#else
#error "no crc32c instruction is known for this processor"
#endif

enum { DONE, MISMATCH, ENDS_EARLY, REFUSED, CHANGED };  /* as in cache/read/gather.py */
enum { CRC_BYTES = 4, AT_ONCE = 3, MAX_ROWS = 128, BLOCK_BYTES = 512 * 1024 };

static uint64_t word_at(const uint8_t *bytes)
{
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

/* The instruction takes three cycles, but one can start in each cycle: three rows take the time of one. */
WITH_CRC static void checksums(uint8_t *const rows[AT_ONCE], int64_t row_bytes, uint32_t sums[AT_ONCE])
{
    uint32_t a = ~0u, b = ~0u, c = ~0u;
    int64_t i = 0;
    for (; i + 8 <= row_bytes; i += 8) {
        a = crc_word(a, word_at(rows[0] + i));
        b = crc_word(b, word_at(rows[1] + i));
        c = crc_word(c, word_at(rows[2] + i));
    }
    for (; i < row_bytes; i++) {
        a = crc_byte(a, rows[0][i]);
        b = crc_byte(b, rows[1][i]);
        c = crc_byte(c, rows[2][i]);
    }
    sums[0] = ~a, sums[1] = ~b, sums[2] = ~c;
}

/* Fills `parts` in order with the bytes from `offset` on, with as few system calls as the kernel allows.
 *
 * Sets `done` to the number of parts that are filled, and `error` to the errno if the result is REFUSED.
 */
static int fill(int file, struct iovec *parts, int count, int64_t offset, int *done, int64_t *error)
{
    for (*done = 0; *done < count;) {
        ssize_t got = preadv(file, parts + *done, count - *done, offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            *error = errno;
            return REFUSED;
        }
        if (got == 0)
            return ENDS_EARLY;
        offset += got;
        for (; *done < count && (size_t)got >= parts[*done].iov_len; ++*done)
            got -= (ssize_t)parts[*done].iov_len;
        if (*done < count) {
            parts[*done].iov_base = (uint8_t *)parts[*done].iov_base + got;
            parts[*done].iov_len -= (size_t)got;
        }
    }
    return DONE;
}

/* True if an open file still has this size in bytes and this mtime in ns. */
static int unchanged(int file, int64_t size, int64_t changed)
{
    struct stat now;
    return fstat(file, &now) == 0 && now.st_size == size
        && (int64_t)now.st_changed.tv_sec * 1000000000 + now.st_changed.tv_nsec == changed;
}

/* Reads row i, the `row_bytes` bytes at `offsets[i]` of the open file `files[i]`, to `out + slots[i]`.
 *
 * The crc32c follows the row in the file. Neighbouring rows are read together, in blocks that fit the CPU cache, so
 * that checking finds them there. Unless the result is DONE, `found[0]` is the row at fault and, for REFUSED,
 * `found[1]` the errno.
 */
static int read_rows(int64_t count, const int32_t *files, const int64_t *offsets, const int64_t *slots, uint8_t *out,
                     int64_t row_bytes, int64_t found[2])
{
    struct iovec parts[2 * MAX_ROWS];
    uint8_t *rows[MAX_ROWS + AT_ONCE];
    uint32_t stored[MAX_ROWS], sums[AT_ONCE];
    int64_t block = BLOCK_BYTES / row_bytes;
    block = block < AT_ONCE ? AT_ONCE : block > MAX_ROWS ? MAX_ROWS : block;

    for (int64_t first = 0; first < count; first += block) {
        int n = (int)(count - first < block ? count - first : block);
        for (int i = 0, run; i < n; i += run) {
            const int32_t *file = files + first + i;
            const int64_t *offset = offsets + first + i;
            run = 0;
            do {
                rows[i + run] = out + slots[first + i + run];
                parts[2 * run] = (struct iovec){rows[i + run], (size_t)row_bytes};
                parts[2 * run + 1] = (struct iovec){stored + i + run, CRC_BYTES};
                run++;
            } while (i + run < n && file[run] == file[0] && offset[run] == offset[run - 1] + row_bytes + CRC_BYTES);
            int done;
            int result = fill(file[0], parts, 2 * run, offset[0], &done, found + 1);
            if (result != DONE) {
                found[0] = first + i + done / 2;
                return result;
            }
        }
        for (int i = 0; i < AT_ONCE; i++)  /* pads the last group of `AT_ONCE` rows with a row that exists */
            rows[n + i] = rows[0];
        for (int i = 0; i < n; i += AT_ONCE) {
            checksums(rows + i, row_bytes, sums);
            for (int j = 0; j < AT_ONCE && i + j < n; j++)
                if (sums[j] != stored[i + j]) {
                    found[0] = first + i + j;
                    return MISMATCH;
                }
        }
    }
    return DONE;
}

/* Calls `read_rows`, then checks the `open_count` files in `opened` (descriptor, size and mtime of each).
 *
 * The result is CHANGED, whatever `read_rows` gave, if file `found[0]` of these was written to: the rows may then mix
 * old and new values. Rename this function if its parameters change, so that a library built earlier is not used.
 */
int gather_unchanged(int64_t count, const int32_t *files, const int64_t *offsets, const int64_t *slots, uint8_t *out,
                     int64_t row_bytes, int64_t open_count, const int64_t *opened, int64_t found[2])
{
    int result = read_rows(count, files, offsets, slots, out, row_bytes, found);
    for (int64_t i = 0; i < open_count; i++)
        if (!unchanged((int)opened[3 * i], opened[3 * i + 1], opened[3 * i + 2])) {
            found[0] = i;
            return CHANGED;
        }
    return result;
}

/* Copies row i, the `row_bytes` bytes at `stored + starts[i]`, to `out + slots[i]` and checks it there against the
 * crc32c that follows it in `stored`. Returns `count`, or the first row that differs.
 */
int64_t unpack_rows(int64_t count, const uint8_t *stored, const int64_t *starts, const int64_t *slots, uint8_t *out,
                    int64_t row_bytes)
{
    uint8_t *rows[AT_ONCE];
    uint32_t sums[AT_ONCE];
    for (int64_t first = 0; first < count; first += AT_ONCE) {
        int n = (int)(count - first < AT_ONCE ? count - first : AT_ONCE);
        for (int i = 0; i < AT_ONCE; i++) {
            int64_t row = first + (i < n ? i : 0);  /* fills up the last group with a row that exists */
            rows[i] = out + slots[row];
            if (i < n)
                memcpy(rows[i], stored + starts[row], (size_t)row_bytes);
        }
        checksums(rows, row_bytes, sums);
        for (int i = 0; i < n; i++)
            if (memcmp(&sums[i], stored + starts[first + i] + row_bytes, CRC_BYTES) != 0)
                return first + i;
    }
    return count;
}
