// The passes as list ops: schemas that say what they write, and their implementation on the CPU and on a GPU. Scalars
// that a reduction computed come in as tensors (float64, one per tensor of the list, or 0-d for all), so that nothing
// has to be read back. samkern/ops checks arguments and has the fakes; what is checked here keeps a direct call from
// touching foreign memory.
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <utility>

#include "cpu/launchers.h"
#include "device_tables.h"
#include "tables.h"

namespace samkern {
namespace {

using at::Tensor;
using at::TensorList;

// One call of a list op: tables over its first list, operands bound row by row, then a pass over them, on the GPU if
// the lists are there.
class Call {
 public:
  explicit Call(TensorList like)
      : on_device_(!like.empty() && is_on_device(like[0])),
        tables_(checked(like), std::vector<int32_t>(like.size(), 0), on_device_ ? kDeviceChunk : kChunk),
        like_(like) {}

  PlanView& view() { return tables_.view; }
  void use_filters() { tables_.use_filters(); }

  void reads(Operand* row, TensorList list, const char* name) {
    for_each(list, name, [&](int64_t t) { row[t] = operand_like(list[t], like_[t], copies_); });
  }

  void writes(Operand* row, TensorList list, const char* name) {
    for_each(list, name, [&](int64_t t) {
      TORCH_CHECK_VALUE(same_layout(list[t], like_[t]), name, "[", t, "] is written and must have the strides ",
                        like_[t].strides(), " of the first list's tensor, got ", list[t].strides());
      row[t] = operand(list[t]);
      bump(list[t]);
    });
  }

  // The bits of a mask over the whole list.
  void mask(Operand* row, const Tensor& bits, const char* name) {
    int64_t n_bytes = 0;
    for (const Tensor& x : like_) n_bytes += mask_bytes(x.numel());
    TORCH_CHECK_VALUE(bits.scalar_type() == at::kByte && bits.is_contiguous() && bits.numel() == n_bytes, name,
                      " must be contiguous uint8 with ", n_bytes, " entries, got ", bits.scalar_type(), " ",
                      bits.sizes());
    check_device(bits, name);
    auto* next = static_cast<uint8_t*>(bits.mutable_data_ptr());
    TORCH_CHECK_VALUE(begins_a_word(next), name, " must begin at a multiple of 4 bytes; pass a copy");
    for (size_t t = 0; t < like_.size(); ++t) {
      row[t] = {next, Dtype::kFloat32};
      next += mask_bytes(like_[t].numel());
    }
  }

  static void bump(const Tensor& x) {
    if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
  }

  // A coefficient per tensor, from a float64 tensor with one entry or as many as the list.
  void coefficient(Coeff which, const Tensor& values, const char* name) {
    const int64_t n = static_cast<int64_t>(like_.size());
    TORCH_CHECK_VALUE(values.scalar_type() == at::kDouble && (values.numel() == 1 || values.numel() == n), name,
                      " must be float64 with 1 or ", n, " entries, got ", values.scalar_type(), " ", values.sizes());
    check_device(values, name);
    coeffs_.emplace_back(which, values.reshape({-1}).expand({n}));
  }

  // A flag per tensor: its momentum buffer has never been written.
  void fresh(const std::optional<Tensor>& first) {
    const auto n = static_cast<int64_t>(like_.size());
    const auto options = n > 0 ? like_[0].options().dtype(at::kByte) : at::TensorOptions(at::kByte);
    if (first) check_device(*first, "first");
    // The pass clears it.
    fresh_ = first ? first->to(at::kByte).reshape({-1}).expand({n}).clone(at::MemoryFormat::Contiguous)
                   : at::zeros({n}, options);
    view().fresh = fresh_.mutable_data_ptr<uint8_t>();
  }

  // A 0-d scalar of the caller's; null if there is none.
  template <typename T>
  const T* scalar(const std::optional<Tensor>& x, const char* name) {
    if (!x) return nullptr;
    TORCH_CHECK_VALUE(x->scalar_type() == c10::CppTypeToScalarType<T>::value && x->numel() == 1, name, " must be one ",
                      c10::CppTypeToScalarType<T>::value, ", got ", x->scalar_type(), " ", x->sizes());
    check_device(*x, name);
    return x->const_data_ptr<T>();
  }

  void check_device(const Tensor& x, const char* name) const {
    TORCH_CHECK_VALUE(like_.empty() || x.device() == like_[0].device(), name, " is on ", x.device(), ", expected ",
                      like_[0].device());
  }

  void reduce(const ReduceOptions& options) {
    if (!on_device_) return cpu::reduce(bound(), options, torch_pool());
    const PlanView& plan = uploaded();
    ReduceOptions there = options;
    there.a = plan.grad + (options.a - view().grad);  // rows lie side by side, here and there
    if (options.b != nullptr) there.b = plan.grad + (options.b - view().grad);
    device_functions()->reduce(plan, there, index());
  }

  void perturb_apply(const PerturbOptions& options) {
    if (!on_device_) return cpu::perturb_apply(bound(), options, torch_pool());
    device_functions()->perturb_apply(uploaded(), options, index());
  }

  void perturb_by_noise(const NoiseOptions& options) {
    if (!on_device_) return cpu::perturb_by_noise(bound(), options, torch_pool());
    device_functions()->perturb_by_noise(uploaded(), options, index());
  }

  void restore() {
    if (!on_device_) return cpu::restore(bound(), torch_pool());
    device_functions()->restore(uploaded(), index());
  }

  void update_apply(const UpdateOptions& options, const Applied& applied = {}) {
    if (!on_device_) return cpu::update_apply(bound(), options, applied, torch_pool());
    device_functions()->update_apply(uploaded(), options, applied, index());
  }

  void select_mask(SelectOptions options) {
    if (!on_device_) return cpu::select_mask(bound(), options, torch_pool());
    const PlanView& plan = uploaded();
    const Tensor counters = at::zeros({device_functions()->n_select_counters(plan, options)},
                                      at::TensorOptions(at::kLong).device(like_[0].device()));
    options.counters = reinterpret_cast<uint64_t*>(counters.mutable_data_ptr<int64_t>());
    device_functions()->select_mask(plan, options, index());
  }

  void fisher_accumulate(const FisherOptions& options) {
    if (!on_device_) return cpu::fisher_accumulate(bound(), options, torch_pool());
    device_functions()->fisher_accumulate(uploaded(), options, index());
  }

  void difference_dot() {
    if (!on_device_) return cpu::difference_dot(bound(), torch_pool());
    PlanView plan = uploaded();
    // A kernel for one dtype reads all four lists as it; the view has looked at a and b.
    const Operand *a = view().grad, *c = view().cache, *d = view().state1;
    for (int32_t t = 0; t < plan.n_tensors; ++t) {
      if (c[t].dtype != a[t].dtype || d[t].dtype != a[t].dtype) plan.common_dtype = -1;
    }
    device_functions()->difference_dot(plan, index());
  }

  // Rows of plan.sums from `first` on, as the pass left them.
  void copy_sums(Sum first, Tensor& to) {
    const int64_t n = to.numel();
    if (!on_device_) return static_cast<void>(std::copy_n(view().sums_of(first), n, to.mutable_data_ptr<double>()));
    to.view(-1).copy_(device_->workspace(device_view_->sums_of(first), n));
  }

 private:
  static TensorList checked(TensorList like) {
    for (size_t t = 0; t < like.size(); ++t) {
      TORCH_CHECK_VALUE(like[t].is_non_overlapping_and_dense(), "tensor ", t, " of shape ", like[t].sizes(),
                        " must be dense and non-overlapping, got strides ", like[t].strides());
    }
    return like;
  }

  template <typename Body>
  void for_each(TensorList list, const char* name, const Body& body) {
    TORCH_CHECK_VALUE(list.size() == like_.size(), name, " has ", list.size(), " tensors, expected ", like_.size());
    for (int64_t t = 0; t < static_cast<int64_t>(list.size()); ++t) {
      TORCH_CHECK_VALUE(list[t].sizes() == like_[t].sizes(), name, "[", t, "] has shape ", list[t].sizes(),
                        ", expected ", like_[t].sizes());
      check_device(list[t], name);
      body(t);
    }
  }

  int index() const { return like_[0].get_device(); }

  const PlanView& bound() {
    for (const auto& [which, values] : coeffs_) {
      const Tensor flat = values.contiguous();
      std::copy_n(flat.const_data_ptr<double>(), flat.numel(), view().coeffs_of(which));
    }
    coeffs_.clear();
    return view();
  }

  // The tables in the memory of the GPU, with everything that has been bound so far.
  const PlanView& uploaded() {
    if (!device_) device_.emplace(tables_, like_[0].device());
    device_view_ = &device_->upload(view());
    for (const auto& [which, values] : coeffs_) {
      device_->workspace(device_view_->coeffs_of(which), values.numel()).copy_(values);
    }
    coeffs_.clear();
    return *device_view_;
  }

  const bool on_device_;
  Tables tables_;
  TensorList like_;
  std::vector<Tensor> copies_;
  std::vector<std::pair<Coeff, Tensor>> coeffs_;
  Tensor fresh_;
  std::optional<DeviceTables> device_;
  const PlanView* device_view_ = nullptr;
};

Climb climb_named(c10::string_view name) {
  if (name == "gradient") return Climb::kEuclidean;
  if (name == "sign") return Climb::kSign;
  if (name == "element") return Climb::kElement;
  if (name == "filter") return Climb::kFilter;
  TORCH_CHECK_VALUE(name == "layer", "expected gradient, sign, element, filter or layer, got ", name);
  return Climb::kLayer;
}

Tensor norms(TensorList a, TensorList b, TensorList w, c10::string_view weighting, double eta,
             const std::optional<Tensor>& mask) {
  Call call(w.empty() ? a : w);
  PlanView& plan = call.view();
  call.reads(plan.grad, a, "a");
  if (!b.empty()) call.reads(plan.first, b, "b");
  if (!w.empty()) call.reads(plan.w, w, "w");
  if (mask) call.mask(plan.mask, *mask, "mask");
  call.use_filters();
  const ClimbGroup group{climb_named(weighting), {1}, eta, 0};
  TORCH_CHECK_VALUE(group.climb == Climb::kEuclidean || !w.empty(), "weighting ", weighting, " needs w");
  call.reduce({.a = plan.grad,
               .b = b.empty() ? nullptr : plan.first,
               .climbs = &group,
               .weights = !w.empty(),
               .masked = mask.has_value()});
  const auto n = static_cast<int64_t>(a.size());
  Tensor sums = at::empty({kCC, n + 1}, a.empty() ? at::TensorOptions(at::kDouble) : a[0].options().dtype(at::kDouble));
  call.copy_sums(kAA, sums);
  return sums;
}

Tensor difference_dot(TensorList a, TensorList b, TensorList c, TensorList d) {
  Call call(a);
  call.reads(call.view().grad, a, "a");
  call.reads(call.view().first, b, "b");
  call.reads(call.view().cache, c, "c");
  call.reads(call.view().state1, d, "d");
  call.difference_dot();
  const auto n = static_cast<int64_t>(a.size());
  Tensor sums = at::empty({n + 1}, a.empty() ? at::TensorOptions(at::kDouble) : a[0].options().dtype(at::kDouble));
  call.copy_sums(kAA, sums);
  return sums;
}

void perturb_(TensorList w, TensorList g, TensorList saved, const Tensor& scale, c10::string_view direction, double eta,
              const std::optional<Tensor>& mask) {
  Call call(w);
  PlanView& plan = call.view();
  const ClimbGroup group{climb_named(direction), {1}, eta, 0};
  call.reads(plan.first, g, "g");
  call.writes(plan.w, w, "w");
  call.writes(plan.saved, saved, "saved");
  for (size_t t = 0; t < w.size(); ++t) {
    TORCH_CHECK_TYPE(saved[t].scalar_type() == w[t].scalar_type(), "saved[", t, "] must be ", w[t].scalar_type());
  }
  call.coefficient(kScale, scale, "scale");
  if (mask) call.mask(plan.mask, *mask, "mask");
  if (group.climb == Climb::kFilter) {
    call.use_filters();
    call.reduce({.a = plan.first, .climbs = &group});
  }
  call.perturb_apply({.climbs = &group, .n_groups = 1});
}

// With from_saved, saved is only read.
void gaussian_perturb_(TensorList w, TensorList saved, double std, int64_t seed, int64_t t, int64_t draw, int64_t first,
                       c10::string_view scale, const std::optional<Tensor>& norms, const std::optional<Tensor>& mask,
                       bool from_saved) {
  Call call(w);
  PlanView& plan = call.view();
  const bool is_given = scale == "given";
  TORCH_CHECK_VALUE(is_given || scale == "filter" || scale == "tensor", "expected filter, tensor or given, got ",
                    scale);
  TORCH_CHECK_VALUE(std >= 0 && std::isfinite(std), "std must be a finite number >= 0, got ", std);
  TORCH_CHECK_VALUE(t >= 0 && t <= UINT32_MAX, "t must be in [0, 2^32), got ", t);
  TORCH_CHECK_VALUE(draw >= 0 && draw < 1 << 24, "draw must be in [0, 2^24), got ", draw);
  TORCH_CHECK_VALUE(first >= 0, "first must be >= 0, got ", first);
  TORCH_CHECK_VALUE(is_given == norms.has_value(), "norms go with scale 'given', got ", scale);
  const ClimbGroup group{scale == "filter" ? Climb::kNoiseFilter : Climb::kNoiseTensor, {std}, 0, 0};
  NoiseOptions options{.climbs = &group,
                       .n_groups = 1,
                       .seed = static_cast<uint64_t>(seed),
                       .t = static_cast<uint32_t>(t),
                       .draw = static_cast<uint32_t>(draw),
                       .first = first,
                       .from_saved = from_saved};
  if (is_given) {
    for (const Tensor& x : w) options.n_norms += x.dim() > 0 ? x.size(0) : 1;
    TORCH_CHECK_VALUE(
        norms->scalar_type() == at::kDouble && norms->is_contiguous() && norms->numel() == options.n_norms,
        "norms must be contiguous float64 with ", options.n_norms, " entries, got ", norms->scalar_type(), " ",
        norms->sizes());
    call.check_device(*norms, "norms");
    options.norms = norms->const_data_ptr<double>();
  }
  if (from_saved) {
    call.reads(plan.saved, saved, "saved");
  } else {
    call.writes(plan.saved, saved, "saved");
    for (size_t i = 0; i < w.size(); ++i) {
      TORCH_CHECK_TYPE(saved[i].scalar_type() == w[i].scalar_type(), "saved[", i, "] must be ", w[i].scalar_type());
    }
  }
  std::copy_n(plan.saved, w.size(), plan.first);  // so that the one dtype of the lists is that of saved, too
  call.writes(plan.w, w, "w");
  if (mask) call.mask(plan.mask, *mask, "mask");
  call.use_filters();
  call.perturb_by_noise(options);
}

void restore_(TensorList w, TensorList saved) {
  Call call(w);
  call.reads(call.view().saved, saved, "saved");
  call.writes(call.view().w, w, "w");
  call.restore();
}

void decompose_(TensorList c, TensorList g, TensorList g_s, const Tensor& k, Tensor& cc) {
  Call call(g_s);
  PlanView& plan = call.view();
  call.reads(plan.grad, g_s, "g_s");
  call.reads(plan.first, g, "g");
  call.writes(plan.cache, c, "c");
  call.coefficient(kProject, k, "k");
  const auto n = static_cast<int64_t>(c.size());
  TORCH_CHECK_VALUE(cc.scalar_type() == at::kDouble && cc.numel() == n + 1 && cc.is_contiguous(),
                    "cc must be contiguous float64 with ", n + 1, " entries, got ", cc.scalar_type(), " ", cc.sizes());
  UpdateOptions options;
  options.mix.mix = Mix::kDecompose;
  call.update_apply(options);
  call.copy_sums(kCC, cc);
  Call::bump(cc);
}

// Sets u = A a + B b, and reads A and B.
void bind_mix(Call& call, UpdateOptions& options, TensorList b, const std::optional<Tensor>& coeff_a,
              const std::optional<Tensor>& coeff_b) {
  if (b.empty()) return;
  TORCH_CHECK_VALUE(coeff_a && coeff_b, "a second list needs both coefficients");
  call.reads(call.view().cache, b, "b");
  call.coefficient(kMixA, *coeff_a, "coeff_a");
  call.coefficient(kMixB, *coeff_b, "coeff_b");
  options.mix.mix = Mix::kReuse;
}

void combine_(TensorList u, TensorList a, TensorList b, const Tensor& coeff_a, const Tensor& coeff_b) {
  Call call(u);
  UpdateOptions options;
  call.reads(call.view().grad, a, "a");
  bind_mix(call, options, b, coeff_a, coeff_b);
  call.writes(call.view().out, u, "u");
  options.hands_over = true;
  call.update_apply(options);
}

// What all base updates share: w from saved, u from its parts, clip factor and skip flag.
Applied bind_update(Call& call, UpdateOptions& options, TensorList w, TensorList u, TensorList saved, TensorList cache,
                    const std::optional<Tensor>& coeff_a, const std::optional<Tensor>& coeff_b,
                    const std::optional<Tensor>& clip, const std::optional<Tensor>& skip) {
  call.reads(call.view().grad, u, "u");
  if (!saved.empty()) call.reads(call.view().saved, saved, "saved");
  bind_mix(call, options, cache, coeff_a, coeff_b);
  call.writes(call.view().w, w, "w");
  return {.skip = call.scalar<bool>(skip, "skip"), .clip = call.scalar<double>(clip, "clip")};
}

void update_sgd_(TensorList w, TensorList u, TensorList momentum_buffer, TensorList saved, TensorList cache,
                 const std::optional<Tensor>& coeff_a, const std::optional<Tensor>& coeff_b,
                 const std::optional<Tensor>& clip, const std::optional<Tensor>& skip, double lr, double momentum,
                 double dampening, double weight_decay, bool nesterov, const std::optional<Tensor>& first) {
  Call call(w);
  const BaseGroup group{
      .lr = {lr}, .weight_decay = weight_decay, .momentum = momentum, .dampening = dampening, .nesterov = nesterov};
  UpdateOptions options;
  options.base = Base::kSgd;
  options.groups = &group;
  options.n_groups = 1;
  const Applied applied = bind_update(call, options, w, u, saved, cache, coeff_a, coeff_b, clip, skip);
  if (momentum != 0) call.writes(call.view().state1, momentum_buffer, "momentum_buffer");
  call.fresh(first);
  call.update_apply(options, applied);
}

template <Base base>
void update_adam(TensorList w, TensorList u, TensorList exp_avg, TensorList exp_avg_sq, TensorList step,
                 TensorList saved, TensorList cache, const std::optional<Tensor>& coeff_a,
                 const std::optional<Tensor>& coeff_b, const std::optional<Tensor>& clip,
                 const std::optional<Tensor>& skip, double lr, double beta1, double beta2, double eps,
                 double weight_decay) {
  Call call(w);
  const BaseGroup group{.lr = {lr}, .weight_decay = weight_decay, .beta1 = beta1, .beta2 = beta2, .eps = eps};
  UpdateOptions options;
  options.base = base;
  options.groups = &group;
  options.n_groups = 1;
  const Applied applied = bind_update(call, options, w, u, saved, cache, coeff_a, coeff_b, clip, skip);
  call.writes(call.view().state1, exp_avg, "exp_avg");
  call.writes(call.view().state2, exp_avg_sq, "exp_avg_sq");
  TORCH_CHECK_VALUE(step.size() == w.size(), "step has ", step.size(), " tensors, expected ", w.size());
  for (size_t t = 0; t < step.size(); ++t) {
    TORCH_CHECK_VALUE(step[t].numel() == 1, "step[", t, "] must have one entry, got ", step[t].sizes());
    call.check_device(step[t], "step");
    call.view().step[t] = operand(step[t]);
    Call::bump(step[t]);
  }
  call.update_apply(options, applied);
}

// Bits of a selected mask are in the order of the list, whose entries are in row-major order.
void check_rows(const Tensor& x, const char* name, size_t t) {
  TORCH_CHECK_VALUE(x.is_contiguous(), name, "[", t, "] must be contiguous, got strides ", x.strides());
}

void topk_mask_(TensorList scores, int64_t k, Tensor& bits, Tensor& n_nan) {
  Call call(scores);
  int64_t n = 0;
  bool wide = false;
  for (size_t t = 0; t < scores.size(); ++t) {
    check_rows(scores[t], "scores", t);
    n += scores[t].numel();
    wide = wide || scores[t].scalar_type() == at::kDouble;
  }
  TORCH_CHECK_VALUE(k >= 0 && k <= n, "k must be in [0, ", n, "], got ", k);
  TORCH_CHECK_VALUE(n_nan.scalar_type() == at::kLong && n_nan.numel() == 1, "n_nan must be one int64, got ",
                    n_nan.scalar_type(), " ", n_nan.sizes());
  call.check_device(n_nan, "n_nan");
  call.reads(call.view().grad, scores, "scores");
  call.mask(call.view().mask, bits, "bits");
  call.select_mask({.what = Select::kTop, .n = k, .n_nan = n_nan.mutable_data_ptr<int64_t>(), .wide = wide});
  Call::bump(bits);
  Call::bump(n_nan);
}

void drop_grow_mask_(Tensor& bits, TensorList g, int64_t n, int64_t seed, int64_t t, bool drops, bool regrow,
                     const std::optional<Tensor>& skip) {
  Call call(g);
  bool wide = false;
  for (size_t i = 0; i < g.size(); ++i) {
    check_rows(g[i], "g", i);
    wide = wide || (drops && g[i].scalar_type() == at::kDouble);
  }
  TORCH_CHECK_VALUE(n >= 0, "n must be >= 0, got ", n);
  TORCH_CHECK_VALUE(t >= 0 && t <= UINT32_MAX, "t must be in [0, 2^32), got ", t);
  call.reads(call.view().grad, g, "g");
  call.mask(call.view().mask, bits, "bits");
  const Tensor before = drops && !regrow ? bits.clone() : Tensor();
  if (before.defined()) call.mask(call.view().saved, before, "bits");
  call.select_mask({.what = drops ? Select::kDropGrow : Select::kGrow,
                    .n = n,
                    .seed = static_cast<uint64_t>(seed),
                    .t = static_cast<uint32_t>(t),
                    .regrow = regrow,
                    .skip = call.scalar<bool>(skip, "skip"),
                    .wide = wide});
  Call::bump(bits);
}

void fisher_accumulate_(TensorList f, TensorList g, double keep, double gain, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& skip) {
  Call call(f);
  call.reads(call.view().grad, g, "g");
  call.writes(call.view().w, f, "f");
  call.fisher_accumulate({.keep = keep,
                          .gain = gain,
                          .scale = call.scalar<double>(scale, "scale"),
                          .skip = call.scalar<bool>(skip, "skip")});
}

// Schemas of the base updates share their middle and, for Adam and AdamW, everything.
#define SAMKERN_MIX_ARGUMENTS                                                                       \
  "Tensor[] saved, Tensor[] cache, Tensor? coeff_a=None, Tensor? coeff_b=None, Tensor? clip=None, " \
  "Tensor? skip=None, *, "
#define SAMKERN_ADAM_ARGUMENTS                                                                \
  "(Tensor(a!)[] w, Tensor[] u, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] " \
  "step, " SAMKERN_MIX_ARGUMENTS "float lr, float beta1, float beta2, float eps, float weight_decay) -> ()"

}  // namespace

TORCH_LIBRARY(samkern, m) {
  m.def(
      "norms(Tensor[] a, Tensor[] b, Tensor[] w, str weighting='gradient', float eta=0.0, Tensor? "
      "mask=None) -> Tensor");
  m.def("difference_dot(Tensor[] a, Tensor[] b, Tensor[] c, Tensor[] d) -> Tensor");
  m.def(
      "perturb_(Tensor(a!)[] w, Tensor[] g, Tensor(b!)[] saved, Tensor scale, str direction='gradient', float eta=0.0, "
      "Tensor? mask=None) -> ()");
  m.def(
      "gaussian_perturb_(Tensor(a!)[] w, Tensor(b!)[] saved, float std, int seed, int t, int draw=0, int first=0, str "
      "scale='filter', Tensor? norms=None, Tensor? mask=None, bool from_saved=False) -> ()");
  m.def("restore_(Tensor(a!)[] w, Tensor[] saved) -> ()");
  m.def("decompose_(Tensor(a!)[] c, Tensor[] g, Tensor[] g_s, Tensor k, Tensor(b!) cc) -> ()");
  m.def("combine_(Tensor(a!)[] u, Tensor[] a, Tensor[] b, Tensor coeff_a, Tensor coeff_b) -> ()");
  m.def("update_sgd_(Tensor(a!)[] w, Tensor[] u, Tensor(b!)[] momentum_buffer, " SAMKERN_MIX_ARGUMENTS
        "float lr, float momentum=0.0, float dampening=0.0, float weight_decay=0.0, bool nesterov=False, "
        "Tensor? first=None) -> ()");
  m.def("topk_mask_(Tensor[] scores, int k, Tensor(a!) bits, Tensor(b!) n_nan) -> ()");
  m.def(
      "drop_grow_mask_(Tensor(a!) bits, Tensor[] g, int n, int seed, int t, bool drops=True, bool regrow=True, Tensor? "
      "skip=None) -> ()");
  m.def(
      "fisher_accumulate_(Tensor(a!)[] f, Tensor[] g, float keep, float gain, Tensor? scale=None, Tensor? skip=None) "
      "-> ()");
  m.def("update_adam_" SAMKERN_ADAM_ARGUMENTS);
  m.def("update_adamw_" SAMKERN_ADAM_ARGUMENTS);
}

// The same functions on the CPU and, with the kernels of samkern._cuda, on a GPU.
void implement(torch::Library& m) {
  m.impl("norms", norms);
  m.impl("difference_dot", difference_dot);
  m.impl("perturb_", perturb_);
  m.impl("gaussian_perturb_", gaussian_perturb_);
  m.impl("restore_", restore_);
  m.impl("decompose_", decompose_);
  m.impl("combine_", combine_);
  m.impl("topk_mask_", topk_mask_);
  m.impl("drop_grow_mask_", drop_grow_mask_);
  m.impl("fisher_accumulate_", fisher_accumulate_);
  m.impl("update_sgd_", update_sgd_);
  m.impl("update_adam_", update_adam<Base::kAdam>);
  m.impl("update_adamw_", update_adam<Base::kAdamW>);
}

TORCH_LIBRARY_IMPL(samkern, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(samkern, CUDA, m) { implement(m); }

}  // namespace samkern
