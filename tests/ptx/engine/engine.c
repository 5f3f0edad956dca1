/* The engine: runs a grid CTA by CTA, a CTA's warps in turn, a warp's instructions with 32 lanes at once.
 *
 * Divergence: a warp is one running fragment (pc, lanes) and others that wait. The fragment furthest back runs first,
 * and fragments at the same pc merge, so that structured control flow comes together again where it should.
 * Blocking: a warp runs until a barrier, an unfinished mbarrier, its exit or the end of its quantum; the schedule says
 * which warp is next. Where no warp can make progress the CTA is deadlocked, and that is an error.
 */
#include "machine.h"
#include "scalar.h"
#include "race.h"
#include "memory.h"
#include "tensor.h"
#include "tma.h"

/* Groups of lines in ops.def. Comparisons are false for unordered operands, those that end in u true. */
#define SETP6(type, T, x, y)                                                                              \
  SETP(eq_##type, T, (x) == (y)) SETP(ne_##type, T, (x) != (y)) SETP(lt_##type, T, (x) < (y))             \
  SETP(le_##type, T, (x) <= (y)) SETP(gt_##type, T, (x) > (y)) SETP(ge_##type, T, (x) >= (y))
#define UNORDERED(x, y) ((x) != (x) || (y) != (y))
#define SETPF(type, T, x, y)                                                                              \
  SETP(eq_##type, T, (x) == (y)) SETP(ne_##type, T, !UNORDERED(x, y) && (x) != (y))                       \
  SETP(lt_##type, T, (x) < (y)) SETP(le_##type, T, (x) <= (y)) SETP(gt_##type, T, (x) > (y))              \
  SETP(ge_##type, T, (x) >= (y)) SETP(equ_##type, T, UNORDERED(x, y) || (x) == (y))                       \
  SETP(neu_##type, T, (x) != (y)) SETP(ltu_##type, T, !((x) >= (y))) SETP(leu_##type, T, !((x) > (y)))    \
  SETP(gtu_##type, T, !((x) <= (y))) SETP(geu_##type, T, !((x) < (y)))                                    \
  SETP(num_##type, T, !UNORDERED(x, y)) SETP(nan_##type, T, UNORDERED(x, y))
#define HALF2(op, expression)                                                                             \
  H2(op##_f16, f16, 16, expression) H2(op##_bf16, bf16, 16, expression)                                   \
  H2(op##_f16x2, f16, 32, expression) H2(op##_bf16x2, bf16, 32, expression)
#define HALF3(op, expression)                                                                             \
  H3(op##_f16, f16, 16, expression) H3(op##_bf16, bf16, 16, expression)                                   \
  H3(op##_f16x2, f16, 32, expression) H3(op##_bf16x2, bf16, 32, expression)

#define SPECIAL_OPS(X)                                                                                    \
  X(bra) X(brx) X(ret) X(trap) X(nop) X(bar_sync) X(bar_warp) X(ld_param) X(ld) X(st) X(atom)             \
  X(pack) X(unpack) X(shfl) X(vote) X(redux) X(elect)                                                     \
  X(cp_async) X(cp_async_commit) X(cp_async_wait) X(ldmatrix) X(stmatrix) X(mma_sync)                     \
  X(wgmma) X(wgmma_commit) X(wgmma_wait) X(mbarrier) X(tma_load) X(tma_store) X(bulk_commit)              \
  X(bulk_wait) X(fence_proxy)

/* The enumeration, then the names, which the assembler reads. */
#define OP1(name, ...) NAMED(name)
#define OP2(name, ...) NAMED(name)
#define OP3(name, ...) NAMED(name)
#define H2(name, ...) NAMED(name)
#define H3(name, ...) NAMED(name)
#define SETP(name, ...) NAMED(setp_##name)
#define BITS(name, ...) NAMED(name)
#define NAMED(name) OP_##name,
enum {
#include "ops.def"
  SPECIAL_OPS(NAMED) OP_COUNT
};
#undef NAMED
#define NAMED(name) #name,
static const char *const op_names[] = {
#include "ops.def"
  SPECIAL_OPS(NAMED)
};
#undef OP1
#undef OP2
#undef OP3
#undef H2
#undef H3
#undef SETP
#undef BITS
int op_count(void) { return OP_COUNT; }
const char *op_name(int i) { return op_names[i]; }
u64 launch_size(void) { return sizeof(Launch); }
u64 insn_size(void) { return sizeof(Insn); }

/* The bodies. */
#define LANE_pred(i) (w->p[in->o[i]] >> l & 1)
#define LANE_u32(i) SLOT(u32, i)[l]
#define LANE_i32(i) SLOT(i32, i)[l]
#define LANE_u64(i) SLOT(u64, i)[l]
#define LANE_f32(i) SLOT(f32, i)[l]
#define LANE_f64(i) SLOT(f64, i)[l]
typedef u32 pred;
#define OP1(name, TD, TA, expression)                           \
  case OP_##name: {                                             \
    TD *d = SLOT(TD, 0);                                        \
    const TA *pa = SLOT(TA, 1);                                 \
    EACH(TA a = pa[l]; d[l] = (TD)(expression));                \
    return OK;                                                  \
  }
#define OP2(name, TD, TA, TB, expression)                       \
  case OP_##name: {                                             \
    TD *d = SLOT(TD, 0);                                        \
    const TA *pa = SLOT(TA, 1);                                 \
    const TB *pb = SLOT(TB, 2);                                 \
    EACH(TA a = pa[l]; TB b = pb[l]; d[l] = (TD)(expression));  \
    return OK;                                                  \
  }
#define OP3(name, TD, TA, TB, TC, expression)                                                             \
  case OP_##name: {                                                                                       \
    TD *d = SLOT(TD, 0);                                                                                  \
    EACH(TA a = LANE_##TA(1); TB b = LANE_##TB(2); TC c = LANE_##TC(3); d[l] = (TD)(expression));         \
    return OK;                                                                                            \
  }
#define HALF(half, i) half_##half(SLOT(u32, i)[l] >> s & 0xffff)
#define H2(name, half, bits, expression)                                                                  \
  case OP_##name:                                                                                         \
    EACH(u32 x = 0; for (int s = 0; s < bits; s += 16) {                                                  \
      f64 a = HALF(half, 1), b = HALF(half, 2);                                                           \
      x |= to_##half(expression) << s;                                                                    \
    } SLOT(u32, 0)[l] = x);                                                                               \
    return OK;
#define H3(name, half, bits, expression)                                                                  \
  case OP_##name:                                                                                         \
    EACH(u32 x = 0; for (int s = 0; s < bits; s += 16) {                                                  \
      f64 a = HALF(half, 1), b = HALF(half, 2), c = HALF(half, 3);                                        \
      x |= to_##half(expression) << s;                                                                    \
    } SLOT(u32, 0)[l] = x);                                                                               \
    return OK;
#define SETP(name, T, expression)                               \
  case OP_setp_##name: {                                        \
    u32 x = 0;                                                  \
    for (int l = 0; l < LANES; l++) {                           \
      T a = SLOT(T, 2)[l], b = SLOT(T, 3)[l];                   \
      x |= (u32)(expression) << l;                              \
    }                                                           \
    set_predicates(w, in, mask, x);                             \
    return OK;                                                  \
  }
#define BITS(name, expression)                                  \
  case OP_##name: {                                             \
    u32 a = w->p[in->o[1]], b = in->o[2] < 0 ? 0 : w->p[in->o[2]]; \
    (void)b;                                                    \
    put_predicate(w, in->o[0], mask, expression);               \
    return OK;                                                  \
  }

/* setp: o[0] the result, o[1] its complement or -1, o[2], o[3] operands, o[4] a predicate to combine with or -1
 * (F_TRANS: negated); kind 1 and, 2 or, 3 xor. */
static void set_predicates(Warp *w, const Insn *in, u32 mask, u32 result) {
  u32 other = in->o[4] < 0 ? 0 : w->p[in->o[4]] ^ (in->flags & F_TRANS ? FULL : 0), both[2] = {result, ~result};
  for (int i = 0; i < 2; i++) {
    u32 x = both[i], y = in->kind == 1 ? x & other : in->kind == 2 ? x | other : in->kind == 3 ? x ^ other : x;
    if (in->o[i] >= 0) put_predicate(w, in->o[i], mask, y);
  }
}

static int scalar_op(Machine *m, Warp *w, const Insn *in, u32 mask) {
  switch (in->op) {
#include "ops.def"
  }
  return fail(m, w, in, -1, "operation %s is not implemented", op_names[in->op]);
}

/* Parts of `size` bytes into one register, or out of it: o[0] that register, n parts in the pool, -1 for none. */
static void pack(Machine *m, Warp *w, const Insn *in, u32 mask) {
  const i32 *part = m->l->pool + in->ext;
  u64 kept = ~0ull >> (64 - 8 * in->size), out[LANES] = {0};
  for (int i = 0; i < in->n; i++)
    for (int l = 0; l < LANES; l++) out[l] |= (w->r[part[i] * LANES + l] & kept) << 8 * in->size * i;
  EACH(put(w, in->o[0], l, out[l], in->flags));
}
static void unpack(Machine *m, Warp *w, const Insn *in, u32 mask) {
  const i32 *part = m->l->pool + in->ext;
  u64 kept = ~0ull >> (64 - 8 * in->size), source[LANES];
  for (int l = 0; l < LANES; l++) source[l] = get(w, in->o[0], l, in->flags);
  for (int i = 0; i < in->n; i++)
    if (part[i] >= 0) EACH(w->r[part[i] * LANES + l] = (u32)(source[l] >> 8 * in->size * i & kept));
}

/* shfl.sync: o[0] d, o[1] a, o[2] b, o[3] c, o[4] members, o[5] predicate or -1; kind 0 up, 1 down, 2 bfly, 3 idx. */
static int shuffle(Machine *m, Warp *w, const Insn *in, u32 mask) {
  u32 out[LANES], valid = 0, *a = SLOT(u32, 1);
  for (int l = 0; l < LANES; l++) {
    if (!(mask >> l & 1)) continue;
    i32 b = SLOT(i32, 2)[l] & 31, c = SLOT(i32, 3)[l], segment = c >> 8 & 31, clamp = c & 31;
    i32 low = l & segment, high = low | (clamp & ~segment);
    i32 from = in->kind == 0 ? l - b : in->kind == 1 ? l + b : in->kind == 2 ? l ^ b : low | (b & ~segment);
    int ok = in->kind == 0 ? from >= high : from <= high;
    if (!ok) from = l;
    if (!(mask >> from & 1)) return fail(m, w, in, l, "shfl from lane %d, which does not take part", from);
    out[l] = a[from];
    valid |= (u32)ok << l;
  }
  EACH(SLOT(u32, 0)[l] = out[l]);
  if (in->o[5] >= 0) put_predicate(w, in->o[5], mask, valid);
  return OK;
}

/* Exchange within a warp. vote: o[0] d, o[1] predicate (F_TRANS: negated), o[2] members; kind 0 ballot, 1 all, 2 any.
 * redux: o[0] d, o[1] a, o[2] members; kind A_*. elect: o[0] d or -1, o[1] predicate, o[2] members. */
static int exchange(Machine *m, Warp *w, const Insn *in, u32 mask) {
  u32 members = SLOT(u32, in->op == OP_shfl ? 4 : 2)[first_lane(mask)];
  if (members & ~w->exited & ~mask)
    return fail(m, w, in, -1, "%s by lanes %08x of a warp, its members are %08x", op_names[in->op], mask, members);
  if (in->op == OP_shfl) return shuffle(m, w, in, mask);
  if (in->op == OP_elect) {
    if (in->o[0] >= 0) EACH(SLOT(u32, 0)[l] = (u32)first_lane(mask));
    put_predicate(w, in->o[1], mask, 1u << first_lane(mask));
  } else if (in->op == OP_vote) {
    u32 x = (w->p[in->o[1]] ^ (in->flags & F_TRANS ? FULL : 0)) & mask;
    if (in->kind == 0) EACH(SLOT(u32, 0)[l] = x);
    else put_predicate(w, in->o[0], mask, (in->kind == 1 ? x == mask : x != 0) ? FULL : 0);
  } else {
    u32 *a = SLOT(u32, 1), x = a[first_lane(mask)];
    for (int l = first_lane(mask) + 1; l < LANES; l++)
      if (mask >> l & 1) x = combine(in->kind, x, a[l], 0);
    EACH(SLOT(u32, 0)[l] = x);
  }
  return OK;
}

/* Let the warps at a barrier go on, ordered after one another, once all that are expected have arrived. */
static void check_barrier(Machine *m, int id) {
  Barrier *b = &m->barrier[id];
  int living = 0, warps = m->l->warps;
  u32 joined[MAX_WARPS] = {0};
  for (int i = 0; i < warps; i++) living += m->warp[i].status != EXITED;
  if (!b->arrived || b->arrived < (b->expected ? b->expected : living)) return;
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < warps; i++) {
      Warp *w = &m->warp[i];
      if (w->status != AT_BARRIER || w->barrier != id) continue;
      if (pass == 0) {
        join_clock(joined, w->clock, warps);
        continue;
      }
      w->status = RUNNING;
      memcpy(w->clock, joined, sizeof joined);
      w->clock[i]++;
    }
  b->arrived = 0;
  m->progress++;
}

/* bar.sync: o[0] its number, o[1] threads or -1 for all. */
static int bar_sync(Machine *m, Warp *w, const Insn *in, u32 mask) {
  u32 id = SLOT(u32, 0)[first_lane(mask)], threads = in->o[1] < 0 ? 0 : SLOT(u32, 1)[first_lane(mask)];
  if (mask != (FULL & ~w->exited)) return fail(m, w, in, -1, "bar.sync by a part of a warp (lanes %08x)", mask);
  if (id >= MAX_BARRIERS || threads % 32) return fail(m, w, in, -1, "bar.sync %u, %u", id, threads);
  w->status = AT_BARRIER;
  w->barrier = (i32)id;
  m->barrier[id].expected = (i32)threads / 32;
  m->barrier[id].arrived++;
  check_barrier(m, (int)id);
  return w->status == AT_BARRIER || m->l->schedule ? YIELD : OK;
}

/* Choose the fragment furthest back, after merging those that meet. */
static void reconverge(Warp *w) {
  for (;;) {
    int behind = -1, merged = 0;
    for (int i = 0; i < w->fragments && !merged; i++) {
      Fragment f = w->fragment[i];
      if (w->mask && f.pc == w->pc) {
        w->mask |= f.mask;
        w->fragment[i] = w->fragment[--w->fragments];
        merged = 1;
      } else if (behind < 0 || f.pc < w->fragment[behind].pc)
        behind = i;
    }
    if (merged) continue;
    if (behind < 0 || (w->mask && w->fragment[behind].pc > w->pc)) return;
    Fragment next = w->fragment[behind];
    w->fragment[behind] = w->mask ? (Fragment){w->pc, w->mask} : w->fragment[--w->fragments];
    w->pc = next.pc;
    w->mask = next.mask;
  }
}

/* bra: o[0] target. brx.idx: o[0] index, n targets in the pool. */
static int branch(Machine *m, Warp *w, const Insn *in, u32 mask) {
  if (in->op == OP_bra && mask == w->mask) {
    w->pc = in->o[0];
    return OK;
  }
  w->mask &= ~mask;
  while (mask) {
    u32 same = mask;
    i32 target = in->o[0];
    if (in->op == OP_brx) {
      u32 *index = SLOT(u32, 0), chosen = index[first_lane(mask)];
      if (chosen >= in->n) return fail(m, w, in, first_lane(mask), "brx.idx %u of %d", chosen, in->n);
      for (int l = 0; l < LANES; l++)
        if (index[l] != chosen) same &= ~(1u << l);
      target = m->l->pool[in->ext + (i32)chosen];
    }
    w->fragment[w->fragments++] = (Fragment){target, same};
    mask &= ~same;
  }
  if (!w->mask) reconverge(w);
  return OK;
}

/* End of a warp; what it started must be over. */
static int exit_warp(Machine *m, Warp *w) {
  w->status = EXITED;
  m->progress++;
  if (w->ncp) return fail(m, w, w->cp[0].in, -1, "the kernel ends with %d cp.async not waited for", w->ncp);
  if (w->nmma) return fail(m, w, w->mma[0].in, -1, "the kernel ends with %d wgmma not waited for", w->nmma);
  for (int i = 0; i < w->nbulk; i++) {
    if (!w->bulk[i].snapshot)
      return fail(m, w, w->bulk[i].in, -1, "the kernel ends with a tensor store whose source was not waited for");
    int status = finish_store(m, w, &w->bulk[i], 1);
    if (status) return status;
  }
  w->nbulk = 0;
  for (int i = 0; i < MAX_BARRIERS; i++) check_barrier(m, i);
  return OK;
}

static int leave(Machine *m, Warp *w, u32 mask) {
  w->exited |= mask;
  w->mask &= ~mask;
  if (w->mask) return OK;
  if (!w->fragments) return exit_warp(m, w) == OK ? YIELD : FAILED;
  reconverge(w);
  return OK;
}

static int execute(Machine *m, Warp *w, const Insn *in, u32 mask) {
  switch (in->op) {
    case OP_bra:
    case OP_brx: return branch(m, w, in, mask);
    case OP_ret: return leave(m, w, mask);
    case OP_trap: return fail(m, w, in, first_lane(mask), "trap or failed assertion");
    case OP_nop: return OK;
    case OP_bar_sync: return bar_sync(m, w, in, mask);
    case OP_bar_warp: /* o[0] members */
      if (SLOT(u32, 0)[first_lane(mask)] & ~w->exited & ~mask)
        return fail(m, w, in, -1, "bar.warp.sync by a part of its members (lanes %08x)", mask);
      return OK;
    case OP_ld_param: { /* o[0] d, o[1] offset */
      u64 x = fetch(m->l->param + in->o[1], in->size, in->flags);
      EACH(put(w, in->o[0], l, x, in->flags));
      return OK;
    }
    case OP_ld: return access_memory(m, w, in, mask, 0);
    case OP_st: return access_memory(m, w, in, mask, 1);
    case OP_atom: return atomic(m, w, in, mask);
    case OP_pack: pack(m, w, in, mask); return OK;
    case OP_unpack: unpack(m, w, in, mask); return OK;
    case OP_shfl:
    case OP_vote:
    case OP_redux:
    case OP_elect: return exchange(m, w, in, mask);
    case OP_cp_async: return cp_async(m, w, in, mask);
    case OP_cp_async_commit: w->cp_group++; return OK;
    case OP_cp_async_wait: return wait_cp_async(m, w, (u32)in->imm);
    case OP_ldmatrix: return move_matrix(m, w, in, mask, 0);
    case OP_stmatrix: return move_matrix(m, w, in, mask, 1);
    case OP_mma_sync: return mma_sync(m, w, in, mask);
    case OP_wgmma: return wgmma(m, w, in, mask);
    case OP_wgmma_commit: w->mma_group++; return OK;
    case OP_wgmma_wait: return wait_wgmma(m, w, (u32)in->imm);
    case OP_mbarrier: return mbarrier(m, w, in, mask);
    case OP_tma_load: return tma_load(m, w, in, mask);
    case OP_tma_store: return tma_store(m, w, in, mask);
    case OP_bulk_commit: w->bulk_group++; return OK;
    case OP_bulk_wait: return wait_bulk(m, w, (u32)in->imm, in->flags & F_READ);
    case OP_fence_proxy:
      w->fences++;
      memcpy(w->fenced, w->clock, sizeof w->clock);
      return OK;
    default: return scalar_op(m, w, in, mask);
  }
}

static int run_warp(Machine *m, Warp *w, i64 quantum) {
  while (quantum-- > 0) {
    if (w->fragments) reconverge(w);
    const Insn *in = &m->l->code[w->pc++];
    u32 guard = in->pred < 0 ? FULL : in->negate ? ~w->p[in->pred] : w->p[in->pred], mask = w->mask & guard;
    m->l->op_count[in->op]++;
    m->now = in;
    if (++m->steps > m->l->max_steps)
      return fail(m, w, in, -1, "more than %lld warp instructions in one CTA", (long long)m->l->max_steps);
    if (!mask) continue;
    if (w->nbusy && in->op != OP_wgmma)
      for (const i32 *slot = m->l->pool + in->uses; slot < m->l->pool + in->uses + in->nuses; slot++)
        if (w->busy[*slot]) return fail(m, w, in, -1, "touches a register of a wgmma that is still running");
    int status = execute(m, w, in, mask);
    if (status) return status;
  }
  m->progress++;
  return OK;
}

static void start_warp(Machine *m, int i) {
  Warp *w = &m->warp[i];
  const Launch *l = m->l;
  memcpy(w->r, l->image, (size_t)l->slots * LANES * 4);
  memset(w->p, 0xff, (size_t)l->predicates * 4);
  memset(w->busy, 0, (size_t)l->slots);
  w->index = i;
  w->pc = w->status = w->fragments = w->ncp = w->nbulk = w->nmma = w->nbusy = 0;
  w->mask = FULL;
  w->exited = w->cp_group = w->bulk_group = w->mma_group = w->fences = 0;
  memset(w->clock, 0, sizeof w->clock);
  memset(w->fenced, 0, sizeof w->fenced);
  w->clock[i] = 1;
  for (int lane = 0; lane < LANES; lane++) {
    u32 values[S_COUNT] = {(u32)(i * LANES + lane), (u32)m->ctaid[0], (u32)m->ctaid[1], (u32)m->ctaid[2],
                           (u32)l->grid[0], (u32)l->grid[1], (u32)l->grid[2]};
    for (int s = 0; s < S_COUNT; s++)
      if (l->special[s] >= 0) w->r[l->special[s] * LANES + lane] = values[s];
  }
}

static void start_cta(Machine *m, i64 cta) {
  const i32 *grid = m->l->grid;
  m->cta = cta;
  m->ctaid[0] = (i32)(cta % grid[0]);
  m->ctaid[1] = (i32)(cta / grid[0] % grid[1]);
  m->ctaid[2] = (i32)(cta / grid[0] / grid[1]);
  memset(m->shared, 0xff, m->l->shared_size);
  if (m->l->races) memset(m->shadow, 0, sizeof(Shadow) * (m->l->shared_size / 2 + 1));
  memset(m->barrier, 0, sizeof m->barrier);
  for (int i = 0; i < m->mbarriers; i++) m->mbarrier[i].live = 0, m->mbarrier[i].queued = 0;
  m->mbarriers = 0;
  m->steps = 0;
  for (int i = 0; i < m->l->warps; i++) start_warp(m, i);
}

static int deadlock(Machine *m) {
  static const char *const states[] = {"waits at", "is at the barrier of", "left at"};
  char text[1024];
  int n = 0;
  for (int i = 0; i < m->l->warps && n < 960; i++)
    n += snprintf(text + n, sizeof text - (size_t)n, " warp %d %s line %d;", i, states[m->warp[i].status],
                  m->l->code[m->warp[i].pc - 1].line);
  return fail(m, NULL, NULL, -1, "deadlock:%s", text);
}

enum { FORWARD, REVERSE, RANDOM };

static u32 next_random(u32 *state) { /* xorshift */
  *state ^= *state << 13;
  *state ^= *state >> 17;
  return *state ^= *state << 5;
}

/* Run warps for one round, each once, or as many drawn ones; returns FAILED or the number that are not done. */
static int run_round(Machine *m, u32 *random, int *living) {
  int warps = m->l->warps, schedule = m->l->schedule;
  for (int turn = 0; turn < warps; turn++) {
    int i = schedule == REVERSE ? warps - 1 - turn : turn;
    if (schedule == RANDOM) i = (int)(next_random(random) % (u32)warps);
    i64 quantum = schedule == RANDOM ? 1 + next_random(random) % (u32)m->l->quantum : 1 << 20;
    if (m->warp[i].status == RUNNING && run_warp(m, &m->warp[i], quantum) == FAILED) return FAILED;
  }
  *living = 0;
  for (int i = 0; i < warps; i++) *living += m->warp[i].status != EXITED;
  return OK;
}

static int run_cta(Machine *m, i64 cta) {
  u32 random = m->l->seed * 2654435761u + (u32)cta * 40503u + 1;
  int idle = 0, living = 1;
  if (!random) random = 1;
  start_cta(m, cta);
  while (living) {
    u64 before = m->progress;
    if (run_round(m, &random, &living)) return FAILED;
    idle = m->progress == before ? idle + 1 : 0;
    /* a random round may have missed the warp that can run, but hardly a hundred in a row */
    if (living && idle > (m->l->schedule == RANDOM ? 100 : 0)) return deadlock(m);
  }
  for (int i = 0; i < m->mbarriers; i++)
    if (m->mbarrier[i].live && m->mbarrier[i].queued)
      return fail(m, NULL, m->mbarrier[i].queue[0].in, -1, "the kernel ends with a tensor load not waited for");
  return OK;
}

static void allocate(Machine *m) {
  const Launch *l = m->l;
  m->shared = aligned_alloc(1024, (l->shared_size + 1023) / 1024 * 1024 + 1024);
  m->warp = calloc((size_t)l->warps, sizeof(Warp));
  for (int i = 0; i < l->warps; i++) {
    m->warp[i].r = aligned_alloc(128, (size_t)(l->slots + 1) * LANES * 4);
    m->warp[i].p = malloc((size_t)(l->predicates + 1) * 4);
    m->warp[i].busy = malloc((size_t)l->slots + 1);
  }
  if (!l->races) return;
  m->shadow = malloc(sizeof(Shadow) * (l->shared_size / 2 + 1));
  m->global_shadow = calloc((size_t)l->ranges + 1, sizeof(GlobalShadow));
  for (int i = 0; i < l->ranges; i++) {
    m->global_shadow[i].writer = calloc(l->range[i].end - l->range[i].start, 4);
    m->global_shadow[i].reader = calloc(l->range[i].end - l->range[i].start, 4);
  }
}

static void release(Machine *m) {
  for (int i = 0; i < m->l->warps; i++) {
    Warp *w = &m->warp[i];
    for (int j = 0; j < w->nbulk; j++) free(w->bulk[j].snapshot);
    for (int j = 0; j < w->nmma; j++) free(w->mma[j].a_registers);
    free(w->r), free(w->p), free(w->busy), free(w->cp), free(w->bulk), free(w->mma);
  }
  for (int i = 0; i < m->l->ranges && m->global_shadow; i++)
    free(m->global_shadow[i].writer), free(m->global_shadow[i].reader);
  for (int i = 0; i < MAX_MBARRIERS; i++) free(m->mbarrier[i].queue);
  free(m->warp), free(m->shared), free(m->shadow), free(m->global_shadow);
}

/* Run every CTA of a launch, in order or last first. Returns OK or FAILED; what was found is in the launch. */
int run_launch(Launch *launch) {
  Machine *m = calloc(1, sizeof *m);
  i64 count = (i64)launch->grid[0] * launch->grid[1] * launch->grid[2];
  int status = OK;
  m->l = launch;
  allocate(m);
  for (i64 i = 0; i < count && !status; i++) status = run_cta(m, launch->reverse_ctas ? count - 1 - i : i);
  release(m);
  free(m);
  return status;
}
