// The operations of cpu_ops.h as MLX's own: nodes of its graphs, which run on its CPU stream. Called through C, in
// mlx-c's way, by src/mlx/ffi/kernels.rs. Single precision on the CPU only; who calls sees to that.

#include <array>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "cpu_ops.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/c/array.h"
#include "mlx/c/error.h"
#include "mlx/c/private/mlx.h"
#include "mlx/c/vector.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"

namespace {

namespace mx = mlx::core;
using Arrays = std::vector<mx::array>;

class CpuOperation : public mx::Primitive {
 public:
  explicit CpuOperation(mx::Stream stream) : mx::Primitive(stream) {}

  void eval_gpu(const Arrays&, Arrays&) override { throw std::runtime_error("this operation runs on the CPU only"); }

 protected:
  template <class Work>
  void run(Work&& work) {
    mx::cpu::get_command_encoder(stream()).dispatch(std::forward<Work>(work));
  }

  static float* allocate(mx::array& output) {
    output.set_data(mx::allocator::malloc(output.nbytes()));
    return output.data<float>();
  }
};

class Gated : public CpuOperation {
 public:
  Gated(mx::Stream stream, mlxd_gate gate) : CpuOperation(stream), gate_(gate) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const int inner = inputs[0].shape(-1) / 2, rows = static_cast<int>(inputs[0].size() / (2 * inner));
    run([rows, inner, gate = gate_, from = inputs[0].data<float>(), to = allocate(outputs[0])] {
      mlxd_cpu_gated(rows, inner, gate, from, to);
    });
  }

  const char* name() const override { return "Gated"; }

 private:
  mlxd_gate gate_;
};

class RmsNorm : public CpuOperation {
 public:
  RmsNorm(mx::Stream stream, float eps) : CpuOperation(stream), eps_(eps) {}

  // x, y and weight give x + y and its norm; x and weight give the norm.
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const bool adds = inputs.size() == 3;
    const int size = inputs[0].shape(-1), rows = static_cast<int>(inputs[0].size()) / size;
    const float* y = adds ? inputs[1].data<float>() : nullptr;
    float* sum = adds ? allocate(outputs[1]) : nullptr;
    run([rows, size, y, sum, eps = eps_, x = inputs[0].data<float>(), weight = inputs.back().data<float>(),
         out = allocate(outputs[0])] { mlxd_cpu_rms_norm(rows, size, eps, x, y, weight, sum, out); });
  }

  const char* name() const override { return "RmsNorm"; }

 private:
  float eps_;
};

class Attention : public CpuOperation {
 public:
  // The weights that it has of q_norm, k_norm, v_norm and sinks.
  using Has = std::array<bool, 4>;

  Attention(mx::Stream stream, mlxd_attention_shape shape, Has has, std::shared_ptr<std::vector<mlxd_span>> spans)
      : CpuOperation(stream), shape_(shape), has_(has), spans_(std::move(spans)) {}

  // From qkv, cos, sin, the arrays of slabs and the weights to the output and the arrays again, changed in place if
  // nobody else holds them.
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    // Each output names the inputs: as long as all do, every slab is held several times. They are about to be
    // detached, and only those of the one that is evaluated are still read.
    for (mx::array& output : outputs)
      if (&output.inputs() != &inputs) output.inputs().clear();
    const bool has_values = shape_.values_from == 0;
    auto slabs = std::make_shared<std::vector<mlxd_slab>>();
    for (size_t i = 1; i < outputs.size(); i++) {
      const mx::array& before = inputs[i + 2];
      if (!before.flags().row_contiguous) throw std::runtime_error("a slab is not contiguous");
      if (before.is_donatable()) {
        outputs[i].copy_shared_buffer(before);
      } else {
        float* to = allocate(outputs[i]);
        run([to, from = before.data<float>(), bytes = before.nbytes()] { std::memcpy(to, from, bytes); });
      }
      if (has_values && i % 2 == 0) slabs->back().values = outputs[i].data<float>();
      else slabs->push_back({outputs[i].data<float>(), nullptr, before.shape(2)});
    }
    mlxd_attention a{};
    a.shape = shape_;
    a.tokens = inputs[0].shape(0);
    a.qkv = inputs[0].data<float>();
    a.cos = inputs[1].data<float>();
    a.sin = inputs[2].data<float>();
    size_t weight = outputs.size() + 2;
    const auto next = [&](size_t i) { return has_[i] ? inputs[weight++].data<float>() : nullptr; };
    a.q_norm = next(0);
    a.k_norm = next(1);
    a.v_norm = next(2);
    a.sinks = next(3);
    a.out = allocate(outputs[0]);
    run([a, slabs, spans = spans_]() mutable {
      a.slabs = slabs->data();
      a.spans = spans->data();
      a.span_count = static_cast<int>(spans->size());
      mlxd_cpu_attention(&a);
    });
  }

  const char* name() const override { return "Attention"; }

 private:
  mlxd_attention_shape shape_;
  Has has_;
  std::shared_ptr<std::vector<mlxd_span>> spans_;
};

void fail(const char* why) { throw std::invalid_argument(why); }

mx::Stream cpu() { return mx::default_stream(mx::Device::cpu); }

mx::array whole(const mx::array& x) {
  if (x.dtype() != mx::float32) fail("this operation takes float32");
  return mx::contiguous(x, false, cpu());
}

// Makes memory of our own zero: whole pages are given back to the system, which gives empty ones when they are used.
void clear(char* begin, size_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), at = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (at + page - 1) / page * page, last = (at + bytes) / page * page;
  const bool given_back = first < last && !madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  if (!given_back) {
    std::memset(begin, 0, bytes);
    return;
  }
  std::memset(begin, 0, first - at);
  std::memset(begin + (last - at), 0, at + bytes - last);
}

template <class Make>
int guarded(Make&& make) {
  try {
    make();
    return 0;
  } catch (std::exception& error) {
    mlx_error(error.what());
    return 1;
  }
}

int planes(const mlxd_attention_shape& a) { return a.values_from ? 1 : 2; }

void check(const mlxd_attention_shape& a, const Arrays& inputs, size_t arrays, const std::vector<mlxd_span>& spans) {
  const int width = a.head_dim - a.values_from;
  if (a.head_dim < 1 || a.head_dim > MLXD_HEAD_DIM_MAX || a.head_dim % MLXD_HEAD_DIM_MULTIPLE) fail("head_dim");
  if (a.values_from < 0 || width < 1 || width % MLXD_HEAD_DIM_MULTIPLE) fail("values_from");
  if (a.kv_heads < 1 || a.heads % a.kv_heads || a.rotated < 0 || a.rotated % 2 || a.rotated > a.head_dim)
    fail("heads or rotated");
  const int tokens = inputs[0].shape(0), heads = a.heads + (a.stores ? planes(a) * a.kv_heads : 0);
  if (inputs[0].size() != static_cast<size_t>(tokens) * heads * a.head_dim) fail("qkv");
  for (int i : {1, 2})
    if (inputs[i].size() != static_cast<size_t>(tokens) * a.rotated / 2) fail("cos or sin");
  for (const auto& span : spans) {
    if (span.slab < 0 || static_cast<size_t>(span.slab + 1) * planes(a) > arrays) fail("a span's slab");
    const mx::Shape& slab = inputs[span.slab * planes(a) + 3].shape();
    if (slab.size() != 4 || slab[1] != a.kv_heads || slab[3] != a.head_dim) fail("a slab");
    if (inputs[(span.slab + 1) * planes(a) + 2].shape() != slab) fail("a slab's values");
    if (span.slot < 0 || span.slot >= slab[0] || span.start < 0 || span.rows < 1 || span.start + span.rows > slab[2])
      fail("a span's place");
    if (span.row < 0 || span.row + span.rows > tokens) fail("a span's rows");
  }
}

}  // namespace

// Zeros whose pages come to be one by one, when each is first written: to write all of a large KV slab at once would
// take hundreds of milliseconds. Memory of a GPU is MLX's matter.
extern "C" int mlxd_zeros(mlx_array* res, const int* shape, size_t dimensions, mlx_dtype dtype) {
  return guarded([&] {
    const mx::Shape sizes(shape, shape + dimensions);
    const mx::Dtype type = mlx_dtype_to_cpp(dtype);
    if (mx::is_available(mx::Device::gpu)) {
      mlx_array_set_(*res, mx::zeros(sizes, type));
      return;
    }
    size_t bytes = mx::size_of(type);
    for (int size : sizes) {
      if (size < 0) fail("a shape");
      bytes *= static_cast<size_t>(size);
    }
    mx::array zeros(mx::allocator::malloc(bytes), sizes, type);
    clear(zeros.data<char>(), bytes);
    mlx_array_set_(*res, zeros);
  });
}

extern "C" int mlxd_gated(mlx_array* res, const mlx_array gate_up, mlxd_gate gate) {
  return guarded([&] {
    const mx::array from = whole(mlx_array_get_(gate_up));
    mx::Shape shape = from.shape();
    if (shape.back() < 2 || shape.back() % 2) fail("an odd number of columns");
    shape.back() /= 2;
    mlx_array_set_(*res, mx::array(shape, mx::float32, std::make_shared<Gated>(cpu(), gate), {from}));
  });
}

// The norm of x, or of x + y if `y` is not empty; then `sum` is that.
extern "C" int mlxd_rms_norm(mlx_array* res, mlx_array* sum, const mlx_array x, const mlx_array y,
                             const mlx_array weight, float eps) {
  return guarded([&] {
    Arrays inputs{whole(mlx_array_get_(x))};
    if (y.ctx) inputs.push_back(whole(mlx_array_get_(y)));
    if (y.ctx && inputs[1].shape() != inputs[0].shape()) fail("shapes differ");
    inputs.push_back(whole(mlx_array_get_(weight)));
    const mx::Shape shape = inputs[0].shape();
    if (inputs.back().size() != static_cast<size_t>(shape.back())) fail("weight");
    const size_t outputs = inputs.size() - 1;
    const auto made = mx::array::make_arrays(std::vector<mx::Shape>(outputs, shape),
                                             std::vector<mx::Dtype>(outputs, mx::float32),
                                             std::make_shared<RmsNorm>(cpu(), eps), inputs);
    mlx_array_set_(*res, made[0]);
    if (outputs == 2) mlx_array_set_(*sum, made[1]);
  });
}

// `res` becomes the output [tokens, heads * (head_dim - values_from)], and then the arrays of slabs, which replace
// those given: keys and values of each, or keys alone where values are parts of them. `weights` are q_norm, k_norm,
// v_norm and sinks; those that are empty are none.
extern "C" int mlxd_attend_slabs(mlx_vector_array* res, const mlx_array qkv, const mlx_array cos, const mlx_array sin,
                                 const mlx_vector_array slabs, const mlx_array* weights,
                                 const mlxd_attention_shape* shape, const mlxd_span* spans, size_t span_count) {
  return guarded([&] {
    Arrays inputs{whole(mlx_array_get_(qkv)), whole(mlx_array_get_(cos)), whole(mlx_array_get_(sin))};
    std::vector<mx::Shape> shapes{{inputs[0].shape(0), shape->heads * (shape->head_dim - shape->values_from)}};
    for (const mx::array& slab : mlx_vector_array_get_(slabs)) {
      if (slab.dtype() != mx::float32) fail("this operation takes float32");
      inputs.push_back(slab);
      shapes.push_back(slab.shape());
    }
    Attention::Has has{};
    for (size_t i = 0; i < has.size(); i++) {
      if (!(has[i] = weights[i].ctx != nullptr)) continue;
      inputs.push_back(whole(mlx_array_get_(weights[i])));
      const int wanted = i == 3 ? shape->heads : shape->head_dim;
      if (inputs.back().size() != static_cast<size_t>(wanted)) fail("a norm or sinks");
    }
    auto places = std::make_shared<std::vector<mlxd_span>>(spans, spans + span_count);
    check(*shape, inputs, shapes.size() - 1, *places);
    std::vector<mx::Dtype> dtypes(shapes.size(), mx::float32);
    auto operation = std::make_shared<Attention>(cpu(), *shape, has, std::move(places));
    mlx_vector_array_set_(*res, mx::array::make_arrays(std::move(shapes), dtypes, operation, inputs));
  });
}
