/* Loads, stores, atomics and cp.async, on global memory by host address and on the CTA's shared memory. */
#pragma once
#include "machine.h"
#include "race.h"
#include "scalar.h"

enum { SPACE_GLOBAL, SPACE_SHARED };

/* Address of `size` bytes of global memory if the kernel may touch them, else NULL. */
static u8 *global_at(Machine *m, u64 at, u32 size, int writes) {
  const Range *range = m->l->range;
  int r = m->last_range;
  if (at < range[r].start || at + size > range[r].end) {
    for (r = 0; r < m->l->ranges; r++)
      if (at >= range[r].start && at + size <= range[r].end) break;
    if (r == m->l->ranges) return NULL;
    m->last_range = r;
  }
  if (m->l->races) note_global(m, r, at, size, writes);
  return (u8 *)at;
}

static int bad_global(Machine *m, Warp *w, const Insn *in, int lane, u64 at, u32 size, const char *what) {
  u64 nearest = ~0ull;
  const Range *best = NULL;
  for (const Range *r = m->l->range; r < m->l->range + m->l->ranges; r++) {
    u64 distance = at < r->start ? r->start - at : at < r->end ? 0 : at - r->end + 1;
    if (distance < nearest) nearest = distance, best = r;
  }
  return fail(m, w, in, lane, "%s of %u bytes outside every tensor, at byte %lld of the nearest, which has %llu", what,
              size, best ? (long long)(at - best->start) : -1ll,
              best ? (unsigned long long)(best->end - best->start) : 0ull);
}

static inline u8 *shared_at(Machine *m, u32 at, u32 size) {
  u32 offset = at - SHARED_BASE;
  return offset < m->l->shared_size && size <= m->l->shared_size - offset ? m->shared + offset : NULL;
}

static int bad_shared(Machine *m, Warp *w, const Insn *in, int lane, u32 at, u32 size, const char *what) {
  return fail(m, w, in, lane, "%s of %u bytes at shared offset %d, outside the CTA's %u bytes", what, size,
              (i32)(at - SHARED_BASE), m->l->shared_size);
}

static inline u64 fetch(const u8 *p, u32 size, u8 flags) {
  u64 x = 0;
  memcpy(&x, p, size);
  if (flags & F_SIGNED && size < 8 && x >> (8 * size - 1)) x |= ~0ull << (8 * size);
  return x;
}

/* One lane's part of a load or store: n elements between p and the registers. */
static inline void move_lane(Warp *w, const Insn *in, const i32 *data, int l, u8 *p, int writes) {
  for (int i = 0; i < in->n; i++, p += in->size) {
    if (writes) {
      u64 x = get(w, data[i], l, in->flags);
      memcpy(p, &x, in->size);
    } else
      put(w, data[i], l, fetch(p, in->size, in->flags), in->flags);
  }
}

static int access_global(Machine *m, Warp *w, const Insn *in, u32 mask, int writes) {
  const u64 *base = SLOT(u64, 0);
  u32 bytes = (u32)in->size * in->n;
  for (int l = 0; l < LANES; l++) {
    if (!(mask >> l & 1)) continue;
    u64 at = base[l] + (u64)in->imm;
    if (at % bytes) return fail(m, w, in, l, "misaligned access of %u bytes at 0x%llx", bytes, (unsigned long long)at);
    u8 *p = global_at(m, at, bytes, writes);
    if (!p) return bad_global(m, w, in, l, at, bytes, writes ? "store" : "load");
    move_lane(w, in, m->l->pool + in->ext, l, p, writes);
  }
  return OK;
}

static int access_shared(Machine *m, Warp *w, const Insn *in, u32 mask, int writes) {
  u32 bytes = (u32)in->size * in->n;
  for (int l = 0; l < LANES; l++) {
    if (!(mask >> l & 1)) continue;
    u32 at = SLOT(u32, 0)[l] + (u32)in->imm;
    if (at % bytes) return fail(m, w, in, l, "misaligned access at shared offset %d", (i32)(at - SHARED_BASE));
    u8 *p = shared_at(m, at, bytes), before[16];
    if (!p) return bad_shared(m, w, in, l, at, bytes, writes ? "store" : "load");
    memcpy(before, p, bytes);
    move_lane(w, in, m->l->pool + in->ext, l, p, writes);
    if (m->l->races)
      note(m, w, in, at, bytes, !writes ? NOTE_READ : memcmp(before, p, bytes) ? NOTE_WRITE : NOTE_SAME_WRITE);
  }
  return OK;
}

/* ld, st: o[0] address, o[1] space; the registers in the pool; imm an offset. */
static int access_memory(Machine *m, Warp *w, const Insn *in, u32 mask, int writes) {
  return in->o[1] == SPACE_GLOBAL ? access_global(m, w, in, mask, writes) : access_shared(m, w, in, mask, writes);
}

enum { A_ADD, A_MIN_S, A_MAX_S, A_MIN_U, A_MAX_U, A_AND, A_OR, A_XOR, A_EXCH, A_CAS, A_ADD_F32 };

/* What an atomic of 4 bytes, or a reduction within a warp, makes of `old` and its operands. */
static u32 combine(int kind, u32 old, u32 x, u32 y) {
  switch (kind) {
    case A_ADD: return old + x;
    case A_MIN_S: return (i32)old < (i32)x ? old : x;
    case A_MAX_S: return (i32)old > (i32)x ? old : x;
    case A_MIN_U: return old < x ? old : x;
    case A_MAX_U: return old > x ? old : x;
    case A_AND: return old & x;
    case A_OR: return old | x;
    case A_XOR: return old ^ x;
    case A_EXCH: return x;
    case A_CAS: return old == x ? y : old;
    default: return as_u32(as_f32(old) + as_f32(x));
  }
}

/* atom, red of 4 bytes: o[0] result or -1, o[1] address, o[2] space, o[3] operand, o[4] second operand; kind A_*. */
static int atomic(Machine *m, Warp *w, const Insn *in, u32 mask) {
  m->atomic_now = 1;
  for (int l = 0; l < LANES; l++) {
    if (!(mask >> l & 1)) continue;
    int global = in->o[2] == SPACE_GLOBAL;
    u64 at = global ? SLOT(u64, 1)[l] + (u64)in->imm : SLOT(u32, 1)[l] + (u32)in->imm;
    if (at % 4) return fail(m, w, in, l, "misaligned atomic at 0x%llx", (unsigned long long)at);
    u8 *p = global ? global_at(m, at, 4, 1) : shared_at(m, (u32)at, 4);
    if (!p) return (global ? bad_global(m, w, in, l, at, 4, "atomic") : bad_shared(m, w, in, l, (u32)at, 4, "atomic"));
    if (!global && m->l->races) note(m, w, in, (u32)at, 4, NOTE_ATOMIC);
    u32 old = (u32)fetch(p, 4, 0), y = in->o[4] < 0 ? 0 : SLOT(u32, 4)[l];
    u32 updated = combine(in->kind, old, SLOT(u32, 3)[l], y);
    memcpy(p, &updated, 4);
    if (in->o[0] >= 0) SLOT(u32, 0)[l] = old;
  }
  m->atomic_now = 0;
  m->progress++;
  return OK;
}

/* Copy what a cp.async promised, with zeros behind the source. */
static int deliver_cp_async(Machine *m, Warp *w, const CpAsync *c) {
  u32 size = c->in->size;
  for (int l = 0; l < LANES; l++) {
    if (!(c->mask >> l & 1)) continue;
    u8 *to = shared_at(m, c->to[l], size);
    if (m->l->races) note(m, w, c->in, c->to[l], size, NOTE_COPY_WRITE);
    if (c->bytes[l]) {
      u8 *from = global_at(m, c->from[l], c->bytes[l], 0);
      if (!from) return bad_global(m, w, c->in, l, c->from[l], c->bytes[l], "cp.async");
      memcpy(to, from, c->bytes[l]);
    }
    memset(to + c->bytes[l], 0, size - c->bytes[l]);
  }
  return OK;
}

/* cp.async: o[0] shared, o[1] global address, o[2] bytes to read or -1; imm, pool[ext] their offsets; size to write.
 * The destination is NaN until the copy is waited for. */
static int cp_async(Machine *m, Warp *w, const Insn *in, u32 mask) {
  CpAsync c = {.in = in, .mask = mask, .group = w->cp_group};
  for (int l = 0; l < LANES; l++) {
    if (!(mask >> l & 1)) continue;
    c.to[l] = SLOT(u32, 0)[l] + (u32)in->imm;
    c.from[l] = SLOT(u64, 1)[l] + (u64)(i64)m->l->pool[in->ext];
    c.bytes[l] = in->o[2] < 0 ? in->size : SLOT(u32, 2)[l];
    if (c.bytes[l] > in->size) return fail(m, w, in, l, "cp.async of %u bytes reads %u", in->size, c.bytes[l]);
    if (c.to[l] % in->size || (c.bytes[l] && c.from[l] % in->size))
      return fail(m, w, in, l, "misaligned cp.async of %u bytes", in->size);
    u8 *to = shared_at(m, c.to[l], in->size);
    if (!to) return bad_shared(m, w, in, l, c.to[l], in->size, "cp.async");
    if (c.bytes[l] && !global_at(m, c.from[l], c.bytes[l], 0))
      return bad_global(m, w, in, l, c.from[l], c.bytes[l], "cp.async");
    if (m->l->races) note(m, w, in, c.to[l], in->size, NOTE_COPY_WRITE);
    memset(to, 0xff, in->size);
  }
  if (!m->l->late) return deliver_cp_async(m, w, &c);
  GROW(w->cp, w->ncp, w->cap_cp);
  w->cp[w->ncp++] = c;
  return OK;
}

/* Deliver what must be complete when at most `pending` of the committed groups may be in flight. */
static int wait_cp_async(Machine *m, Warp *w, u32 pending) {
  int kept = 0;
  for (int i = 0; i < w->ncp; i++) {
    if (w->cp_group - w->cp[i].group <= pending) {
      w->cp[kept++] = w->cp[i];
      continue;
    }
    int status = deliver_cp_async(m, w, &w->cp[i]);
    if (status) return status;
  }
  w->ncp = kept;
  return OK;
}
