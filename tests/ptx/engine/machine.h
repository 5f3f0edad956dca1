/* Data of the machine: programs as assembler.py encodes them, launches, warps, and what a CTA shares.
 *
 * A warp's register file is an array of slots; a slot holds one 32-bit value for each of 32 lanes. Registers of 32 bits
 * and fewer take one slot, those of 64 bits two (as 32 u64). Constants are slots too, filled in before the start.
 * A predicate is one u32, a bit a lane. `Insn`, `Range`, `TensorMap`, `Race` and `Launch` are mirrored in binding.py.
 */
#pragma once
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
typedef float f32;
typedef double f64;

#define LANES 32
#define FULL 0xffffffffu
#define SHARED_BASE 1024u /* address of a CTA's first shared byte; below it nothing is valid */
#define MAX_WARPS 32
#define MAX_BARRIERS 16
#define MAX_MBARRIERS 128
#define MAX_RACES 64

typedef struct {
  u16 op, n;       /* operation; number of vector operands */
  i32 pred;        /* guard predicate, -1 for none */
  u8 negate;       /* guard negated */
  u8 size;         /* bytes of a memory element */
  u8 flags;        /* F_* */
  u8 kind;         /* which of several forms, by operation */
  i32 o[6];        /* operands: slots, predicates or plain numbers, by operation; -1 for none */
  i32 ext;         /* where its vector operands begin in the pool */
  i32 line;        /* of the PTX */
  i32 uses, nuses; /* all register slots that it touches, in the pool */
  i64 imm;
} Insn;

enum { F_WIDE = 1, F_SIGNED = 2, F_TRANS = 4, F_READ = 8, F_TRANS_B = 16 };

typedef struct { /* memory that the kernel may touch */
  u64 start, end;
} Range;

typedef struct { /* our own contents of the 128 bytes of a CUtensorMap; stride[0] is the element's size */
  u64 magic, base, dim[5], stride[5];
  u32 box[5];
  u8 rank, element, swizzle, nan_fill; /* swizzle: 0 none, 1, 2, 3 of 32, 64, 128 bytes */
} TensorMap;
#define TENSOR_MAP_MAGIC 0x50414d524f534e54ull

typedef struct {
  i32 kind, line_a, line_b, warp_a, warp_b;
  u64 address;
  i64 cta;
} Race;

/* Where the registers lie that say which thread this is. */
enum { S_TID_X, S_CTAID_X, S_CTAID_Y, S_CTAID_Z, S_NCTAID_X, S_NCTAID_Y, S_NCTAID_Z, S_COUNT };

typedef struct {
  /* program; image is a register file with the constants filled in */
  const Insn *code;
  const i32 *pool;
  const u32 *image;
  i32 slots, predicates, special[S_COUNT];
  /* launch */
  i32 grid[3], warps;
  u32 shared_size, param_size;
  const u8 *param;
  const Range *range;
  i32 ranges;
  /* options */
  i32 late, schedule, quantum, races, reverse_ctas;
  u32 seed;
  i64 max_steps;
  /* results */
  u64 *op_count;
  Race race[MAX_RACES];
  i32 nrace, failed_line, failed_warp, failed_lane;
  i64 failed_cta;
  char message[2048];
} Launch;

typedef struct { /* race detector: for each byte of a range 1 + the CTA that wrote it, read it; SEVERAL; ATOMIC */
  u32 *writer, *reader;
} GlobalShadow;
#define SEVERAL 0xffffffffu
#define ATOMIC 0xfffffffeu

typedef struct { /* race detector: the last write of 2 bytes of shared memory, and each warp's last read */
  u32 clock, line, fences;
  u8 warp, generic, atomic;
  u32 read_clock[MAX_WARPS], read_line[MAX_WARPS];
} Shadow;

typedef struct { /* a cp.async in flight */
  const Insn *in;
  u32 to[LANES], bytes[LANES], mask, group;
  u64 from[LANES];
} CpAsync;

typedef struct { /* a bulk tensor copy in flight; clock: of the issuing warp, when it was issued */
  const Insn *in;
  const TensorMap *map;
  i32 c[5];
  u32 shared, bytes, group;
  i32 warp;
  u8 *snapshot;
  u32 clock[MAX_WARPS];
} Bulk;

typedef struct { /* a wgmma in flight; a_registers: a copy, or NULL where a lies in shared memory */
  const Insn *in;
  u64 a, b;
  u32 accumulate, group, *a_registers;
} Wgmma;

typedef struct { /* lanes of a warp that wait elsewhere */
  i32 pc;
  u32 mask;
} Fragment;

enum { RUNNING, AT_BARRIER, EXITED };
enum { OK, FAILED, YIELD };

typedef struct {
  u32 *r, *p; /* registers, predicates */
  i32 pc, index, status, barrier;
  u32 mask, exited;
  Fragment fragment[LANES];
  i32 fragments;
  CpAsync *cp;
  Bulk *bulk;
  Wgmma *mma;
  i32 ncp, cap_cp, nbulk, cap_bulk, nmma, cap_mma;
  u32 cp_group, bulk_group, mma_group;
  u8 *busy; /* slots that a wgmma in flight reads or writes */
  i32 nbusy;
  u32 clock[MAX_WARPS], fenced[MAX_WARPS], fences; /* race detector: vector clock, and as it was at the last fence */
} Warp;

typedef struct {
  u32 address, phase, refused, live, clock[MAX_WARPS];
  i32 count, pending;
  i64 bytes; /* that are still to arrive */
  Bulk *queue;
  i32 queued, cap_queue;
} Mbarrier;

typedef struct {
  i32 arrived, expected;
} Barrier;

typedef struct {
  Launch *l;
  i64 cta;
  i32 ctaid[3], last_range;
  u8 *shared;
  Warp *warp;
  Barrier barrier[MAX_BARRIERS];
  Mbarrier mbarrier[MAX_MBARRIERS];
  i32 mbarriers, atomic_now;
  u64 progress;
  i64 steps;
  const Insn *now;
  Shadow *shadow;
  GlobalShadow *global_shadow;
} Machine;

/* Ends the launch with a message: says where, and returns FAILED. */
static int fail(Machine *m, const Warp *w, const Insn *in, int lane, const char *format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(m->l->message, sizeof m->l->message, format, list);
  va_end(list);
  m->l->failed_line = in ? in->line : -1;
  m->l->failed_warp = w ? w->index : -1;
  m->l->failed_lane = lane;
  m->l->failed_cta = m->cta;
  return FAILED;
}

#define GROW(array, count, capacity)                                    \
  do {                                                                  \
    if ((count) == (capacity)) {                                        \
      (capacity) = (capacity) ? 2 * (capacity) : 16;                    \
      (array) = realloc((array), (size_t)(capacity) * sizeof *(array)); \
    }                                                                   \
  } while (0)

/* Statements for each lane l of the mask; a whole warp's are vectorised. */
#define EACH(...)                               \
  do {                                          \
    if (mask == FULL) {                         \
      _Pragma("GCC ivdep")                      \
      for (int l = 0; l < LANES; l++) {         \
        __VA_ARGS__;                            \
      }                                         \
    } else                                      \
      for (int l = 0; l < LANES; l++)           \
        if (mask >> l & 1) {                    \
          __VA_ARGS__;                          \
        }                                       \
  } while (0)
#define SLOT(T, i) ((T *)(w->r + in->o[i] * LANES))

static inline int first_lane(u32 mask) { return __builtin_ctz(mask); }
static inline u64 get(const Warp *w, i32 slot, int l, u8 flags) {
  return flags & F_WIDE ? ((const u64 *)(w->r + slot * LANES))[l] : w->r[slot * LANES + l];
}
static inline void put(Warp *w, i32 slot, int l, u64 value, u8 flags) {
  if (flags & F_WIDE)
    ((u64 *)(w->r + slot * LANES))[l] = value;
  else
    w->r[slot * LANES + l] = (u32)value;
}
static inline void put_predicate(Warp *w, i32 predicate, u32 mask, u32 value) {
  w->p[predicate] = (w->p[predicate] & ~mask) | (value & mask);
}
