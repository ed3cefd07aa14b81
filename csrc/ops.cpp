// The passes as list ops: schemas that say what they write, and their CPU implementation. Scalars that a reduction
// computed come in as tensors (float64, one per tensor of the list, or 0-d for all), so that nothing has to be read
// back. samkern/ops.py checks arguments and has the fakes; what is checked here keeps a direct call from touching
// foreign memory.
#include <torch/library.h>

#include "cpu/launchers.h"
#include "tables.h"

namespace samkern {
namespace {

using at::Tensor;
using at::TensorList;

// One call of a list op: tables over its first list, operands bound row by row.
class Call {
 public:
  explicit Call(TensorList like) : tables_(checked(like), std::vector<int32_t>(like.size(), 0)), like_(like) {}

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
      if (!list[t].is_inference()) list[t].unsafeGetTensorImpl()->bump_version();
    });
  }

  // A coefficient per tensor, from a float64 tensor with one entry or as many as the list.
  void coefficient(Coeff which, const Tensor& values, const char* name) {
    const int64_t n = static_cast<int64_t>(like_.size());
    TORCH_CHECK_VALUE(values.scalar_type() == at::kDouble && (values.numel() == 1 || values.numel() == n), name,
                      " must be float64 with 1 or ", n, " entries, got ", values.scalar_type(), " ", values.sizes());
    const Tensor expanded = values.reshape({-1}).expand({n}).contiguous();
    std::copy_n(expanded.const_data_ptr<double>(), n, view().coeffs_of(which));
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
      body(t);
    }
  }

  Tables tables_;
  TensorList like_;
  std::vector<Tensor> copies_;
};

Climb climb_named(c10::string_view name) {
  if (name == "gradient") return Climb::kEuclidean;
  if (name == "sign") return Climb::kSign;
  if (name == "element") return Climb::kElement;
  if (name == "filter") return Climb::kFilter;
  TORCH_CHECK_VALUE(name == "layer", "expected gradient, sign, element, filter or layer, got ", name);
  return Climb::kLayer;
}

Tensor norms(TensorList a, TensorList b, TensorList w, c10::string_view weighting, double eta) {
  Call call(w.empty() ? a : w);
  PlanView& plan = call.view();
  call.reads(plan.grad, a, "a");
  if (!b.empty()) call.reads(plan.first, b, "b");
  if (!w.empty()) call.reads(plan.w, w, "w");
  call.use_filters();
  const ClimbGroup group{climb_named(weighting), {1}, eta, 0};
  TORCH_CHECK_VALUE(group.climb == Climb::kEuclidean || !w.empty(), "weighting ", weighting, " needs w");
  cpu::reduce(plan, {.a = plan.grad, .b = b.empty() ? nullptr : plan.first, .climbs = &group, .weights = !w.empty()},
              torch_pool());
  const auto n = static_cast<int64_t>(a.size());
  Tensor sums = at::empty({kCC, n + 1}, a.empty() ? at::TensorOptions(at::kDouble) : a[0].options().dtype(at::kDouble));
  std::copy_n(plan.sums, kCC * (n + 1), sums.mutable_data_ptr<double>());
  return sums;
}

void perturb_(TensorList w, TensorList g, TensorList saved, const Tensor& scale, c10::string_view direction,
              double eta) {
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
  if (group.climb == Climb::kFilter) {
    call.use_filters();
    cpu::reduce(plan, {.a = plan.first, .climbs = &group}, torch_pool());
  }
  cpu::perturb_apply(plan, {.climbs = &group, .report = nullptr}, torch_pool());
}

void restore_(TensorList w, TensorList saved) {
  Call call(w);
  call.reads(call.view().saved, saved, "saved");
  call.writes(call.view().w, w, "w");
  cpu::restore(call.view(), torch_pool());
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
  cpu::update_apply(plan, options, {}, torch_pool());
  std::copy_n(plan.sums_of(kCC), n + 1, cc.mutable_data_ptr<double>());
  if (!cc.is_inference()) cc.unsafeGetTensorImpl()->bump_version();
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
  cpu::update_apply(call.view(), options, {}, torch_pool());
}

// What all base updates share: w from saved, u from its parts, clip factor and skip flag.
cpu::Applied bind_update(Call& call, UpdateOptions& options, TensorList w, TensorList u, TensorList saved,
                         TensorList cache, const std::optional<Tensor>& coeff_a, const std::optional<Tensor>& coeff_b,
                         const std::optional<Tensor>& clip, const std::optional<Tensor>& skip) {
  call.reads(call.view().grad, u, "u");
  if (!saved.empty()) call.reads(call.view().saved, saved, "saved");
  bind_mix(call, options, cache, coeff_a, coeff_b);
  call.writes(call.view().w, w, "w");
  return {.skip = skip.has_value() && skip->item<bool>(), .clip = clip.has_value() ? clip->item<double>() : 1.0};
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
  const cpu::Applied applied = bind_update(call, options, w, u, saved, cache, coeff_a, coeff_b, clip, skip);
  if (momentum != 0) call.writes(call.view().state1, momentum_buffer, "momentum_buffer");
  const auto n = static_cast<int64_t>(w.size());
  const Tensor fresh = first ? first->to(at::kByte).reshape({-1}).expand({n}).contiguous() : at::zeros({n}, at::kByte);
  std::copy_n(fresh.const_data_ptr<uint8_t>(), n, call.view().fresh);
  cpu::update_apply(call.view(), options, applied, torch_pool());
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
  const cpu::Applied applied = bind_update(call, options, w, u, saved, cache, coeff_a, coeff_b, clip, skip);
  call.writes(call.view().state1, exp_avg, "exp_avg");
  call.writes(call.view().state2, exp_avg_sq, "exp_avg_sq");
  TORCH_CHECK_VALUE(step.size() == w.size(), "step has ", step.size(), " tensors, expected ", w.size());
  for (size_t t = 0; t < step.size(); ++t) {
    TORCH_CHECK_VALUE(step[t].numel() == 1, "step[", t, "] must have one entry, got ", step[t].sizes());
    call.view().step[t] = operand(step[t]);
    if (!step[t].is_inference()) step[t].unsafeGetTensorImpl()->bump_version();
  }
  cpu::update_apply(call.view(), options, applied, torch_pool());
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
  m.def("norms(Tensor[] a, Tensor[] b, Tensor[] w, str weighting='gradient', float eta=0.0) -> Tensor");
  m.def(
      "perturb_(Tensor(a!)[] w, Tensor[] g, Tensor(b!)[] saved, Tensor scale, str direction='gradient', float eta=0.0) "
      "-> ()");
  m.def("restore_(Tensor(a!)[] w, Tensor[] saved) -> ()");
  m.def("decompose_(Tensor(a!)[] c, Tensor[] g, Tensor[] g_s, Tensor k, Tensor(b!) cc) -> ()");
  m.def("combine_(Tensor(a!)[] u, Tensor[] a, Tensor[] b, Tensor coeff_a, Tensor coeff_b) -> ()");
  m.def("update_sgd_(Tensor(a!)[] w, Tensor[] u, Tensor(b!)[] momentum_buffer, " SAMKERN_MIX_ARGUMENTS
        "float lr, float momentum=0.0, float dampening=0.0, float weight_decay=0.0, bool nesterov=False, "
        "Tensor? first=None) -> ()");
  m.def("update_adam_" SAMKERN_ADAM_ARGUMENTS);
  m.def("update_adamw_" SAMKERN_ADAM_ARGUMENTS);
}

TORCH_LIBRARY_IMPL(samkern, CPU, m) {
  m.impl("norms", norms);
  m.impl("perturb_", perturb_);
  m.impl("restore_", restore_);
  m.impl("decompose_", decompose_);
  m.impl("combine_", combine_);
  m.impl("update_sgd_", update_sgd_);
  m.impl("update_adam_", update_adam<Base::kAdam>);
  m.impl("update_adamw_", update_adam<Base::kAdamW>);
}

}  // namespace samkern
