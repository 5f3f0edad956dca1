// A pretended CUDA device for a torch that has none: tensors on "cuda:i" whose memory is the host's and whose kernels
// are the CPU's, and devices, contexts and streams that are counted. Faithful are the dispatch keys, the autograd
// engine's thread for a device with its streams, and which call makes a context where (torch's c10/cuda/CUDAFunctions.cpp).
#include <ATen/core/Tensor.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <mutex>
#include <set>

using namespace at;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IntArrayRef;
using c10::Stream;
using c10::StreamId;

namespace {

constexpr int kDevices = 4;
const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

// Devices, contexts, streams ------------------------------------------------------------------------------------------

thread_local DeviceIndex current = 0;  // cudaGetDevice
thread_local DeviceIndex target = -1;  // the device that a thread will have once it needs one
thread_local std::array<StreamId, kDevices> streams = {};
std::mutex contexts_lock;
std::set<int> contexts;
std::atomic<int64_t> next_stream{1};
std::atomic<int64_t> to_device{0}, to_host{0};  // copies

void cuda_set_device(int d) {  // makes the device's primary context, since CUDA 12
  current = d;
  std::lock_guard<std::mutex> lock(contexts_lock);
  contexts.insert(d);
}

bool has_context(int d) {
  std::lock_guard<std::mutex> lock(contexts_lock);
  return contexts.count(d) > 0;
}

int get_device() { return target >= 0 ? target : current; }

void set_device(int d) {
  target = -1;
  if (current != d) cuda_set_device(d);
}

void maybe_set_device(int d) {
  if (has_context(d)) set_device(d);
  else target = d;
}

int exchange_device(int d) {
  if (d < 0) return -1;
  int before = get_device();
  target = -1;
  if (before != d || current != d) cuda_set_device(d);
  return before;
}

int maybe_exchange_device(int d) {
  if (d < 0) return -1;
  int before = get_device();
  if (before != d) maybe_set_device(d);
  return before;
}

Device on(int d) { return Device(DeviceType::CUDA, static_cast<DeviceIndex>(d)); }

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  Device getDevice() const override { return on(get_device()); }
  void setDevice(Device d) const override { set_device(d.index()); }
  void uncheckedSetDevice(Device d) const noexcept override { maybe_set_device(d.index()); }
  Device exchangeDevice(Device d) const override {
    int before = get_device();
    if (before != d.index()) set_device(d.index());
    return on(before);
  }
  Stream getStream(Device d) const override {
    int i = d.index() < 0 ? get_device() : d.index();
    return Stream(Stream::UNSAFE, on(i), streams[i]);
  }
  Stream getDefaultStream(Device d) const override { return Stream(Stream::UNSAFE, on(d.index()), 0); }
  Stream getNewStream(Device d, int) const override { return Stream(Stream::UNSAFE, on(d.index()), next_stream++); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return getNewStream(d, 0); }
  Stream exchangeStream(Stream s) const override {
    Stream before = getStream(s.device());
    streams[s.device_index()] = s.id();
    return before;
  }
  // Work is done when a call returns, so events have nothing to order.
  void record(void** event, const Stream&, DeviceIndex, c10::EventFlag) const override { *event = &streams; }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks final : public CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex d) const override { return has_context(d); }
  DeviceIndex current_device() const override { return get_device(); }
  DeviceIndex getCurrentDevice() const override { return get_device(); }
  void setCurrentDevice(DeviceIndex d) const override { set_device(d); }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { return exchange_device(d); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return maybe_exchange_device(d); }
  DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  Device getDeviceFromPtr(void*) const override { return on(get_device()); }
};
c10::Registerer<std::string, std::unique_ptr<CUDAHooksInterface>, CUDAHooksArgs> registered(
    "CUDAHooks", CUDAHooksRegistry(),
    c10::Registerer<std::string, std::unique_ptr<CUDAHooksInterface>, CUDAHooksArgs>::DefaultCreator<Hooks>);

// Memory and tensors --------------------------------------------------------------------------------------------------

std::atomic<int64_t> allocated{0}, peak{0};  // bytes

void count(int64_t bytes) {
  int64_t now = allocated += bytes;
  for (int64_t most = peak; now > most && !peak.compare_exchange_weak(most, now);) {
  }
}

struct Block {
  void* memory;
  int64_t bytes;
};

void release(void* block) {
  auto* b = static_cast<Block*>(block);
  allocated -= b->bytes;
  c10::free_cpu(b->memory);
  delete b;
}

struct HostMemory final : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, on(get_device())};
    count(bytes);
    void* p = c10::alloc_cpu(bytes);
    return {p, new Block{p, static_cast<int64_t>(bytes)}, release, on(get_device())};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
};
HostMemory memory;

struct OnDevice {  // of an allocation: the thread's device is another meanwhile
  int before = get_device();
  explicit OnDevice(std::optional<Device> d) {
    if (d && d->has_index() && d->index() != before) set_device(d->index());
  }
  ~OnDevice() { maybe_set_device(before); }
};

ScalarType type_of(std::optional<ScalarType> dtype) {
  return dtype.value_or(c10::get_default_dtype_as_scalartype());
}

Tensor make_empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
                  std::optional<Device> device, std::optional<bool>, std::optional<MemoryFormat> format) {
  OnDevice there(device);
  return at::detail::empty_generic(size, &memory, kKeys, type_of(dtype), format);
}

Tensor make_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                    std::optional<Device> device, std::optional<bool>) {
  OnDevice there(device);
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, type_of(dtype));
}

// The CPU tensor over the memory of a pretended one.
Tensor on_host(const Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto options = t.options().device(c10::kCPU).requires_grad(false).pinned_memory(false);
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [keep = t](void*) {}, options);
}

// The pretended tensor over the memory of a CPU tensor.
Tensor wrap(const Tensor& t, DeviceIndex device) {
  if (!t.defined() || t.is_cuda()) return t;
  count(t.storage().nbytes());
  auto let_go = [](void* kept) {
    allocated -= static_cast<Tensor*>(kept)->storage().nbytes();
    delete static_cast<Tensor*>(kept);
  };
  c10::DataPtr pointer(t.storage().mutable_data(), new Tensor(t), let_go, on(device));
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(pointer), nullptr, false);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), kKeys, t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return out;
}

void become(const Tensor& self, const Tensor& other) {  // self's storage and shape are other's from now on
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(other.storage());
  impl->set_sizes_and_strides(other.sizes(), other.strides(), other.storage_offset());
}

Tensor strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(self.storage_offset()));
  return out;
}

Tensor viewed(const Tensor& self, IntArrayRef size) {  // the CPU's rules for strides, on no memory
  auto shape = at::from_blob(nullptr, self.sizes(), self.strides(), self.options().device(c10::kCPU)).view(size);
  return strided(self, shape.sizes(), shape.strides(), self.storage_offset());
}

Tensor reshaped(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return strided(self, size, stride, self.storage_offset());
}

const Tensor& resized(const Tensor& self, IntArrayRef size, std::optional<MemoryFormat> format) {
  if (self.sizes() != size) become(self, make_empty(size, self.scalar_type(), {}, self.device(), {}, format));
  return self;
}

Tensor& set_from_tensor(Tensor& self, const Tensor& source) {
  become(self, source);
  return self;
}

Tensor& set_from_storage(Tensor& self, c10::Storage s, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(s);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& copied(Tensor& self, const Tensor& source, bool) {
  if (self.is_cuda() && !source.is_cuda()) to_device++;
  if (!self.is_cuda() && source.is_cuda()) to_host++;
  on_host(self).copy_(on_host(source));
  return self;
}

Tensor copied_to(const Tensor& self, const Tensor& to, bool non_blocking) {
  Tensor out = to;
  return copied(out, self, non_blocking);
}

void not_recorded(Tensor&, Stream) {}

// Every other op ------------------------------------------------------------------------------------------------------

// The CPU's kernel on the same memory: arguments become CPU tensors, results pretended ones.
void on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto begin = stack->size() - schema.arguments().size();
  int device = -1;
  std::vector<std::pair<Tensor, Tensor>> pairs;  // a pretended argument and its CPU tensor
  auto host = [&](const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    device = t.device().index();
    pairs.emplace_back(t, on_host(t));
    return pairs.back().second;
  };
  for (size_t i = begin; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = host(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (Tensor t : value.toTensorList()) list.push_back(host(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : value.toOptionalTensorList())
        list.push_back(t ? std::optional<Tensor>(host(*t)) : t);
      value = list;
    } else if (value.isDevice()) {
      device = value.toDevice().has_index() ? value.toDevice().index() : get_device();
      value = Device(c10::kCPU);
    }
  }
  if (device < 0) device = get_device();
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [t, on_cpu] : pairs) {  // an out tensor that the CPU's kernel made larger
    bool moved = on_cpu.numel() && (!t.numel() || on_cpu.data_ptr() != t.data_ptr());
    if (moved || t.sizes() != on_cpu.sizes()) become(t, wrap(on_cpu, t.device().index()));
  }
  auto back = [&](const Tensor& c) {
    for (auto& [t, on_cpu] : pairs)
      if (c.unsafeGetTensorImpl() == on_cpu.unsafeGetTensorImpl()) return t;
    return wrap(c, static_cast<DeviceIndex>(device));
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (Tensor t : value.toTensorList()) list.push_back(back(t));
      value = list;
    } else if (!pairs.empty()) {  // a number or a truth: on a GPU the host waits for it
      to_host++;
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", make_empty);
  m.impl("empty_strided", make_strided);
  m.impl("copy_", copied);
  m.impl("_copy_from", copied_to);
  m.impl("as_strided", strided);
  m.impl("view", viewed);
  m.impl("_reshape_alias", reshaped);
  m.impl("resize_", resized);
  m.impl("set_.source_Tensor", set_from_tensor);
  m.impl("set_.source_Storage_storage_offset", set_from_storage);
  m.impl("record_stream", not_recorded);
}

TORCH_LIBRARY(rehearsal, m) {
  m.def("on_host(Tensor x) -> Tensor", [](Tensor x) { return on_host(x.detach()); });
  m.def("wrap(Tensor x, int device) -> Tensor",
        [](Tensor x, int64_t d) { return wrap(x.detach(), static_cast<DeviceIndex>(d)); });
}

extern "C" {
int device_count() { return kDevices; }
int device_get() { return get_device(); }
void device_set(int d) { set_device(d); }
int device_exchange(int d) { return exchange_device(d); }
int device_maybe_exchange(int d) { return maybe_exchange_device(d); }
int device_has_context(int d) { return has_context(d); }
int64_t stream_get(int d) { return streams[d]; }
int64_t stream_new() { return next_stream++; }
int64_t copies_to_device() { return to_device; }
int64_t copies_to_host() { return to_host; }
int64_t bytes_allocated() { return allocated; }
int64_t bytes_peak() { return peak; }
void bytes_reset_peak() { peak = allocated.load(); }

// torch/csrc/cuda/Module.cpp, THCPModule_setStream_wrap
void stream_set(int64_t id, int d) {
  if (get_device() != d) set_device(d);
  streams[d] = id;
}

// As in a process that has not touched a device yet.
void contexts_forget() {
  std::lock_guard<std::mutex> lock(contexts_lock);
  contexts.clear();
  current = 0;
  target = -1;
}
}
