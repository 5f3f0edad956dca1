/* Tensor cores: mma.sync, wgmma with its shared-memory descriptors, ldmatrix and stmatrix; f16 and bf16 into f32.
 *
 * Products and their sums are formed in f64 and rounded to f32 once an instruction.
 */
#pragma once
#include "memory.h"

enum { T_F16, T_BF16 };

static inline f32 element(u32 raw, int type) { return type == T_F16 ? (f32)half_f16(raw) : as_f32(raw << 16); }

/* d (rows, n) += a (rows, 16) b (16, n); all row-major. */
static void multiply(f64 *restrict d, const f32 *restrict a, const f32 *restrict b, int rows, int n) {
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < 16; i++) {
      f64 x = a[r * 16 + i];
      for (int j = 0; j < n; j++) d[r * n + j] += x * (f64)b[i * n + j];
    }
}

/* The (16, 16) fragment that four registers a lane hold: lane l has columns 2 (l % 4) and the next, in the row l / 4
 * and eight below it, and eight columns on. */
static void unpack_a(f32 *a, const u32 *const registers[4], int type) {
  for (int i = 0; i < 4; i++)
    for (int l = 0; l < LANES; l++) {
      f32 *at = a + (l / 4 + 8 * (i & 1)) * 16 + 2 * (l % 4) + 8 * (i >> 1);
      at[0] = element(registers[i][l] & 0xffff, type);
      at[1] = element(registers[i][l] >> 16, type);
    }
}

/* mma.sync.m16n8k16: the pool holds d[4], a[4], b[2], c[4]; kind T_*. */
static int mma_sync(Machine *m, Warp *w, const Insn *in, u32 mask) {
  if (mask != FULL) return fail(m, w, in, -1, "mma.sync by a part of a warp (lanes %08x)", mask);
  const i32 *d = m->l->pool + in->ext, *a_slot = d + 4, *b_slot = a_slot + 4, *c = b_slot + 2;
  const u32 *registers[4];
  f32 a[16 * 16], b[16 * 8];
  f64 acc[16 * 8];
  for (int i = 0; i < 4; i++) registers[i] = w->r + a_slot[i] * LANES;
  unpack_a(a, registers, in->kind);
  for (int l = 0; l < LANES; l++) {
    for (int i = 0; i < 2; i++) {
      u32 x = w->r[b_slot[i] * LANES + l];
      b[(2 * (l % 4) + 8 * i) * 8 + l / 4] = element(x & 0xffff, in->kind);
      b[(2 * (l % 4) + 8 * i + 1) * 8 + l / 4] = element(x >> 16, in->kind);
    }
    for (int i = 0; i < 4; i++)
      acc[(l / 4 + 8 * (i >> 1)) * 8 + 2 * (l % 4) + (i & 1)] = as_f32(w->r[c[i] * LANES + l]);
  }
  multiply(acc, a, b, 16, 8);
  for (int l = 0; l < LANES; l++)
    for (int i = 0; i < 4; i++)
      w->r[d[i] * LANES + l] = as_u32((f32)acc[(l / 4 + 8 * (i >> 1)) * 8 + 2 * (l % 4) + (i & 1)]);
  return OK;
}

/* ldmatrix, stmatrix: n matrices of 8 rows of 16 bytes; o[0] address, imm its offset, the registers in the pool. */
static int move_matrix(Machine *m, Warp *w, const Insn *in, u32 mask, int writes) {
  if (mask != FULL) return fail(m, w, in, -1, "a matrix moved by a part of a warp (lanes %08x)", mask);
  const i32 *data = m->l->pool + in->ext;
  u32 values[4][LANES] = {{0}};
  for (int i = 0; i < in->n; i++)
    for (int row = 0; row < 8; row++) {
      int l = 8 * i + row;
      u32 at = SLOT(u32, 0)[l] + (u32)in->imm;
      if (at % 16) return fail(m, w, in, l, "matrix row at the misaligned shared offset %d", (i32)(at - SHARED_BASE));
      u8 *p = shared_at(m, at, 16), before[16];
      if (!p) return bad_shared(m, w, in, l, at, 16, "matrix row");
      memcpy(before, p, 16);
      for (int j = 0; j < 8; j++) {
        int lane = in->flags & F_TRANS ? 4 * j + row / 2 : 4 * row + j / 2;
        int high = in->flags & F_TRANS ? row & 1 : j & 1;
        u16 x = (u16)(w->r[data[i] * LANES + lane] >> 16 * high);
        if (writes)
          memcpy(p + 2 * j, &x, 2);
        else {
          memcpy(&x, p + 2 * j, 2);
          values[i][lane] |= (u32)x << 16 * high;
        }
      }
      if (m->l->races)
        note(m, w, in, at, 16, !writes ? NOTE_READ : memcmp(before, p, 16) ? NOTE_WRITE : NOTE_SAME_WRITE);
    }
  for (int i = 0; i < in->n && !writes; i++) memcpy(w->r + data[i] * LANES, values[i], sizeof values[i]);
  return OK;
}

/* An operand of wgmma in shared memory: `rows` of the M or N dimension from `first` on, 16 elements of K each, decoded
 * into out[row * row_stride + k * k_stride], or only noted as read where out is NULL.
 *
 * Source of the layouts: PTX ISA, "Matrix descriptor". The swizzle works on bits of the address itself. */
static int wgmma_operand(Machine *m, Warp *w, const Insn *in, u64 descriptor, int mn_major, int first, int rows,
                         f32 *out, int row_stride, int k_stride) {
  static const u32 spans[4] = {16, 128, 64, 32}, masks[4] = {0, 7, 3, 1};
  u32 mode = (u32)(descriptor >> 62), span = spans[mode], start = (u32)(descriptor & 0x3fff) << 4;
  u32 leading = (u32)(descriptor >> 16 & 0x3fff) << 4, stride = (u32)(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 49 & 7) return fail(m, w, in, -1, "wgmma descriptor with a base offset");
  for (int i = 0; i < 2 * rows; i++) { /* pieces of 16 bytes */
    int r = mn_major ? i / 16 * 8 : i / 2, k = mn_major ? i % 16 : i % 2 * 8;
    u32 row = (u32)(first + r), k8 = (u32)k / 8, at;
    if (!mn_major) at = row / 8 * stride + row % 8 * span + k8 * (mode ? 16 : leading);
    else if (!mode) at = row / 8 * stride + k8 * leading + (u32)k % 8 * 16;
    else at = row * 2 / span * leading + k8 * stride + (u32)k % 8 * span + row * 2 % span;
    at += start;
    at ^= (at >> 7 & masks[mode]) << 4;
    u8 *p = shared_at(m, at, 16);
    if (!p) return bad_shared(m, w, in, -1, at, 16, "wgmma operand");
    if (m->l->races) note(m, w, in, at, 16, NOTE_ASYNC_READ);
    for (int j = 0; j < 8 && out; j++) {
      u16 raw;
      memcpy(&raw, p + 2 * j, 2);
      out[(mn_major ? r + j : r) * row_stride + (mn_major ? k : k + j) * k_stride] = element(raw, in->o[0]);
    }
  }
  return OK;
}

/* Both operands of a wgmma; each of a warpgroup's four warps has 16 of the 64 rows. */
static int wgmma_operands(Machine *m, Warp *w, const Wgmma *op, f32 *a, f32 *b) {
  const Insn *in = op->in;
  int status = OK, row = 16 * (w->index & 3);
  if (in->o[1] >= 0) status = wgmma_operand(m, w, in, op->a, in->flags & F_TRANS, row, 16, a, 16, 1);
  return status ? status : wgmma_operand(m, w, in, op->b, in->flags & F_TRANS_B, 0, in->n, b, 1, in->n);
}

static int wgmma_execute(Machine *m, Warp *w, Wgmma *op) {
  static f32 b[16 * 256];
  static f64 acc[16 * 256];
  f32 a[16 * 16];
  const Insn *in = op->in;
  const i32 *d = m->l->pool + in->ext;
  int n = in->n, status = wgmma_operands(m, w, op, a, b);
  if (status) return status;
  if (op->a_registers) {
    const u32 *registers[4];
    for (int i = 0; i < 4; i++) registers[i] = op->a_registers + i * LANES;
    unpack_a(a, registers, in->o[0]);
    free(op->a_registers);
    op->a_registers = NULL;
  }
  for (int pass = 0; pass < 2; pass++) {
    for (int j = 0; j < n / 2; j++)
      for (int l = 0; l < LANES; l++) {
        f64 *x = &acc[(l / 4 + 8 * (j >> 1 & 1)) * n + 8 * (j >> 2) + 2 * (l % 4) + (j & 1)];
        u32 *r = &w->r[d[j] * LANES + l];
        if (pass) *r = as_u32((f32)*x);
        else *x = op->accumulate ? as_f32(*r) : 0;
      }
    if (!pass) multiply(acc, a, b, 16, n);
  }
  return OK;
}

/* Mark the registers of a wgmma as in use (by 1) or free again (by -1). */
static void wgmma_mark(Machine *m, Warp *w, const Insn *in, int by) {
  const i32 *slots = m->l->pool + in->ext;
  int count = in->n / 2 + (in->o[1] < 0 ? 4 : 0);
  for (int i = 0; i < count; i++) w->busy[slots[i]] = (u8)(w->busy[slots[i]] + by);
  w->nbusy += by;
}

/* wgmma.mma_async.m64n{n}k16: the pool holds d[n/2], then a[4] if it comes from registers; o[0] T_*, o[1] descriptor
 * of a or -1, o[2] that of b, o[3] the predicate that says whether to accumulate, or -1: then kind says it. It runs
 * where it is waited for. */
static int wgmma(Machine *m, Warp *w, const Insn *in, u32 mask) {
  if (mask != FULL) return fail(m, w, in, -1, "wgmma by a part of a warp (lanes %08x)", mask);
  Wgmma op = {.in = in, .group = w->mma_group};
  const u64 *b = SLOT(u64, 2), *a = in->o[1] < 0 ? b : SLOT(u64, 1);
  for (int l = 1; l < LANES; l++)
    if (a[l] != a[0] || b[l] != b[0]) return fail(m, w, in, l, "wgmma descriptors differ within a warp");
  op.a = a[0];
  op.b = b[0];
  u32 accumulate = in->o[3] < 0 ? (in->kind ? FULL : 0) : w->p[in->o[3]];
  if (accumulate != 0 && accumulate != FULL) return fail(m, w, in, -1, "wgmma whose scale-d differs within a warp");
  op.accumulate = accumulate != 0;
  if (in->o[1] < 0) {
    op.a_registers = malloc(4 * LANES * 4);
    for (int i = 0; i < 4; i++)
      memcpy(op.a_registers + i * LANES, w->r + m->l->pool[in->ext + in->n / 2 + i] * LANES, LANES * 4);
  }
  int status = OK;
  if (!m->l->late) status = wgmma_execute(m, w, &op);
  else if (m->l->races) status = wgmma_operands(m, w, &op, NULL, NULL); /* they count as read from now on */
  if (status) return status;
  GROW(w->mma, w->nmma, w->cap_mma);
  w->mma[w->nmma++] = op;
  wgmma_mark(m, w, in, 1);
  return OK;
}

static int wait_wgmma(Machine *m, Warp *w, u32 pending) {
  int kept = 0, status;
  for (int i = 0; i < w->nmma; i++) {
    Wgmma *op = &w->mma[i];
    if (w->mma_group - op->group <= pending) {
      w->mma[kept++] = *op;
      continue;
    }
    if (m->l->late && (status = wgmma_execute(m, w, op))) return status;
    wgmma_mark(m, w, op->in, -1);
  }
  w->nmma = kept;
  return OK;
}
