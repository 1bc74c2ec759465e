// A device for tests: the CPU's kernels behind the manners of a GPU.
//
// Its memory is closed to the CPU and starts as NaN, tensors of two devices do not
// meet, a generator belongs to its device, float64 can be missing, and a listener
// hears of all for which the CPU would have to wait for a GPU.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <cstring>

namespace {

using at::Tensor;
const c10::Device SHAM(c10::DeviceType::PrivateUse1, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

struct {
  std::atomic<int64_t> held{0};  // bytes of its memory in use
  int64_t most = 0;              // and at most, so far
  bool float64 = true;
  std::mutex mutex;
  std::unordered_map<size_t, std::vector<void*>> spare;  // pages, to be used again
} state;

// ---- Memory: pages that nobody may touch, opened for a copy only

struct Block {
  void* pages;
  size_t size;
  int readers = 0;

  explicit Block(size_t bytes) : size((bytes + 4095) / 4096 * 4096) {
    std::lock_guard lock(state.mutex);
    auto& spare = state.spare[size];
    if (spare.empty()) {
      const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
      spare.push_back(mmap(nullptr, size, PROT_NONE, flags, -1, 0));
      TORCH_CHECK(spare.back() != MAP_FAILED, "the machine itself is out of memory");
    }
    pages = spare.back();
    spare.pop_back();
    mprotect(pages, size, PROT_READ | PROT_WRITE);
    std::memset(pages, 0xFF, size);  // NaN in any float, -1 in any integer
    mprotect(pages, size, PROT_NONE);
    state.held += size;
    state.most = std::max<int64_t>(state.most, state.held);
  }
  ~Block() {
    std::lock_guard lock(state.mutex);
    state.spare[size].push_back(pages);
    state.held -= size;
  }
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, SHAM};
    auto* block = new Block(bytes);
    auto free = [](void* block) { delete static_cast<Block*>(block); };
    return {block->pages, block, free, SHAM};
  }
  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "the memory of sham is not the CPU's to copy");
  }
} memory;

// A tensor as the CPU's kernels see it, while this lives
class Opened {
  Block* block = nullptr;

 public:
  Tensor view;

  explicit Opened(const Tensor& tensor) : view(tensor) {
    if (tensor.device() != SHAM) return;
    const auto& data = tensor.storage().data_ptr();
    block = static_cast<Block*>(data.get_context());
    if (block->readers++ == 0)
      mprotect(block->pages, block->size, PROT_READ | PROT_WRITE);
    const auto options = tensor.options().device(at::kCPU);
    auto* first = tensor.data_ptr();
    view = at::from_blob(first, tensor.sizes(), tensor.strides(), options);
  }
  ~Opened() {
    if (block && --block->readers == 0) mprotect(block->pages, block->size, PROT_NONE);
  }
};

// ---- Random numbers: the CPU's, from a state of the device's own

struct Numbers final : at::CPUGeneratorImpl {
  Numbers() {
    device_ = SHAM;
    key_set_ = KEYS;
  }
};

at::Generator& own_numbers() {
  static auto numbers = at::make_generator<Numbers>();
  return numbers;
}

// ---- What PyTorch asks of a device

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::PrivateUse1> {
  c10::Device getDevice() const override { return SHAM; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, SHAM);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return own_numbers();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Numbers>();
  }
};

// ---- The few kernels that are not the CPU's

PyObject* listener = nullptr;
thread_local bool inside = false;  // of a kernel, whose own copies are no waits

struct Inside {
  bool before = std::exchange(inside, true);
  ~Inside() { inside = before; }
};

void waits(const std::string& what) {
  if (!listener || inside) return;
  py::gil_scoped_acquire lock;
  py::reinterpret_borrow<py::object>(listener)(what);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  const auto kind = c10::dtype_or_default(dtype);
  TORCH_CHECK_TYPE(state.float64 || kind != at::kDouble, "sham has no float64");
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, kind);
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout, std::optional<at::Device> device,
    std::optional<bool> pinned, std::optional<at::MemoryFormat>) {
  const auto stride = c10::contiguous_strides(size);
  return empty_strided(size, stride, dtype, layout, device, pinned);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  const bool up = !from.is_privateuseone(), down = !to.is_privateuseone();
  if ((up || down) && !non_blocking) waits(up ? "copy to the GPU" : "copy to the CPU");
  if (!from.numel()) return to;
  Opened source(from), target(to);
  target.view.copy_(source.view);
  return to;
}

Tensor copy_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& self) {
  waits("item");
  return at::_local_scalar_dense(Opened(self).view);
}

// ---- All others, by copies of what they take

bool size_depends_on_data(const std::string& name) {
  static const std::unordered_set<std::string> NAMES{"aten::nonzero", "aten::equal",
      "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::bincount",
      "aten::unique_consecutive", "aten::repeat_interleave"};
  return NAMES.count(name);
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto& name = op.schema().name();
  at::Generator numbers, lent;
  if (size_depends_on_data(name)) waits(name.substr(6));
  auto belongs = [&](const Tensor& tensor) {
    TORCH_CHECK(!tensor.defined() || tensor.is_privateuseone() || tensor.dim() == 0,
        "Expected all tensors to be on the same device, but ", name, " got one of ",
        tensor.sizes(), " on ", tensor.device(), " and others on ", SHAM);
  };
  for (size_t i = 0; i < arguments.size(); i++) {
    auto& value = (*stack)[stack->size() - arguments.size() + i];
    if (value.isTensor()) {
      belongs(value.toTensor());
    } else if (value.isTensorList()) {
      for (const Tensor& tensor : value.toTensorVector()) belongs(tensor);
    } else if (value.isOptionalTensorList()) {  // an index may lie on the CPU
      for (const auto& index : value.toOptionalTensorVector()) {
        if (!index || !index->defined()) continue;
        if (!index->is_privateuseone()) waits("copy of an index to the GPU");
        if (index->scalar_type() == at::kBool) waits("nonzero of a mask as index");
      }
    } else if (value.isGenerator() || arguments[i].name() == "generator") {
      numbers = value.isNone() ? own_numbers() : value.toGenerator();
      TORCH_CHECK(numbers.device().type() == SHAM.type(), "Expected a '", SHAM.type(),
          "' device type for generator but found '", numbers.device().type(), "'");
      lent = at::detail::createCPUGenerator();
      lent.set_state(numbers.get_state());
      value = lent;
    }
  }
  Inside kernel;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  if (lent.defined()) numbers.set_state(lent.get_state());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_and_resize);
  library.impl("_local_scalar_dense", &item);
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("resize_", TORCH_FN(at::native::resize_));
  library.impl("set_.source_Storage", TORCH_FN(at::native::set_));
  library.impl("set_.source_Storage_storage_offset",
      TORCH_FN(at::native::set_storage_cpu_));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  c10::SetAllocator(SHAM.type(), &memory);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  module.def("default_generator", [] { return own_numbers(); });
  module.def("max_memory_allocated", [] { return state.most; });
  module.def("set_float64", [](bool there) { state.float64 = there; });
  module.def("set_listener", [](py::object heard) {
    Py_XDECREF(listener);
    listener = heard.is_none() ? nullptr : heard.release().ptr();
  });
}

}  // namespace

// ---- Autocast: CUDA's lists of operations

namespace at::autocast {

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // the macros say m
#define IN_HALF(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define IN_FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define INTO_FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define IN_THE_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(IN_HALF)
  AT_FORALL_FP32(IN_FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(INTO_FLOAT32)
  AT_FORALL_PROMOTE(IN_THE_WIDEST)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(
      KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
}

}  // namespace at::autocast
