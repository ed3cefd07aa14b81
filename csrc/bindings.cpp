// samkern._C: the Plan, which holds the tensor lists of one optimizer between steps and runs its half-steps.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "cpu/launchers.h"
#include "device_tables.h"
#include "tables.h"

namespace py = pybind11;

namespace samkern {
namespace {

using at::Tensor;
// climb, rho, eta, trust_clip, rho on the device
using ClimbTuple = std::tuple<int32_t, double, double, double, std::optional<Tensor>>;
// lr, weight_decay, momentum, dampening, nesterov, beta1, beta2, eps, lr on the device
using BaseTuple = std::tuple<double, double, double, double, bool, double, double, double, std::optional<Tensor>>;
// mix, scope, min_sine, alpha of each group, weights of each tensor
using MixTuple = std::tuple<int32_t, int32_t, double, std::vector<double>, std::optional<Tensor>>;

const std::vector<std::string> kReportFields = {"grad_norm",     "second_norm",    "update_norm",   "perturb_norm",
                                                "realised_norm", "realised_share", "skipped_first", "skipped_second"};

// how many weights are in it, decay, warmup
using AverageTuple = std::tuple<Tensor, std::optional<double>, bool>;
// seed, step, draw
using NoiseTuple = std::tuple<py::int_, uint32_t, uint32_t>;
// grad_scale, found_inf
using ScalingTuple = std::tuple<std::optional<Tensor>, std::optional<Tensor>>;

void bump_version(const Tensor& x) {
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

// Calls body(t) for every tensor, on torch's threads: with thousands of tensors a step's time goes into waiting for
// their headers. The body must not destroy a tensor, since that may need Python's lock, which the caller holds.
template <typename Body>
void for_tensors(size_t n, const Body& body) {
  constexpr int64_t kWorthAThread = 256;
  at::parallel_for(0, static_cast<int64_t>(n), kWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(static_cast<size_t>(t));
  });
}

// State of the base optimizer as its Python dicts hold it. Strong references: a pointer that compares equal is the
// object.
class BoundState {
 public:
  void bind(const py::dict& state, std::vector<py::str> keys) {
    keys_ = std::move(keys);
    params_.clear();
    values_.clear();
    tensors_.clear();
    for (const auto& [param, values] : state) {
      params_.push_back(py::reinterpret_borrow<py::object>(param));
      values_.push_back(py::reinterpret_borrow<py::object>(values));
      for (const py::str& key : keys_) tensors_.push_back(py::reinterpret_borrow<py::object>(lookup(values, key)));
    }
  }

  // Whether `state` still holds the same dicts with the same tensors, in the same order.
  bool matches(const py::dict& state) const {
    if (keys_.empty()) return true;
    size_t i = 0, bound = 0;
    for (const auto& [param, values] : state) {
      if (i == params_.size() || !param.is(params_[i]) || !values.is(values_[i])) return false;
      for (const py::str& key : keys_) {
        if (!tensors_[bound++].is(lookup(values, key))) return false;
      }
      ++i;
    }
    return i == params_.size();
  }

  // Calls body(param, key number, tensor) for everything that is there.
  template <typename Body>
  void for_each(const Body& body) const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (tensors_[i]) body(params_[i / keys_.size()].ptr(), i % keys_.size(), tensors_[i].cast<Tensor>());
    }
  }

 private:
  static py::handle lookup(py::handle values, const py::str& key) {
    return PyDict_Check(values.ptr()) ? PyDict_GetItemWithError(values.ptr(), key.ptr()) : nullptr;
  }

  std::vector<py::str> keys_;
  std::vector<py::object> params_, values_, tensors_;  // tensors_: [params_][keys_], null where there is none
};

// Dtypes, shapes and strides of a list, side by side.
class Layouts {
 public:
  explicit Layouts(const std::vector<Tensor>& list) {
    for (const Tensor& x : list) {
      dtypes_.push_back(x.scalar_type());
      first_.push_back(numbers_.size());
      numbers_.insert(numbers_.end(), x.sizes().begin(), x.sizes().end());
      numbers_.insert(numbers_.end(), x.strides().begin(), x.strides().end());
    }
    first_.push_back(numbers_.size());
  }

  bool hold(size_t t, const Tensor& x) const {
    const at::IntArrayRef sizes = x.sizes(), strides = x.strides();
    const int64_t* numbers = numbers_.data() + first_[t];
    return x.scalar_type() == dtypes_[t] && 2 * sizes.size() == first_[t + 1] - first_[t] &&
           std::equal(sizes.begin(), sizes.end(), numbers) &&
           std::equal(strides.begin(), strides.end(), numbers + sizes.size());
  }

 private:
  std::vector<at::ScalarType> dtypes_;
  std::vector<size_t> first_;
  std::vector<int64_t> numbers_;
};

// The tensor lists of one optimizer on the CPU. Addresses are read anew in every call, since gradients move with
// zero_grad() and weights may; what Python replaced behind the plan's back is found by fits() and holds().
class Plan {
 public:
  Plan(const py::list& params, std::vector<int32_t> group, Tensor cache_norm, Tensor fresh, Tensor skips,
       bool on_device)
      : objects_(params),
        params_(params.cast<std::vector<Tensor>>()),
        tables_(params_, std::move(group), on_device ? kDeviceChunk : kChunk),
        layouts_(params_),
        first_(params_.size()),
        state1_(params_.size()),
        state2_(params_.size()),
        step_(params_.size()),
        cache_(params_.size()),
        mask_(params_.size()),
        average_(params_.size()),
        moves_(params_.size(), false),
        slots_(params_.size(), nullptr),
        cache_norm_(std::move(cache_norm)),
        fresh_(std::move(fresh)),
        skips_(std::move(skips)) {
    tables_.view.fresh = fresh_.mutable_data_ptr<uint8_t>();
    if (on_device) device_.emplace(tables_, params_[0].device());
  }

  bool perturbed() const { return perturbed_; }

  // From now on half-steps call add_up(sums), float64 [5, n_tensors + 1], between their sums and what follows from
  // them: it adds what other processes have of the same tensors. None: the tensors are whole.
  void add_up_with(py::object add_up) { add_up_ = std::move(add_up); }
  // What the plan itself keeps in memory now: tensors of the saved copy, first gradients, other tensors, and the bytes
  // of tables that are no tensors.
  std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, int64_t> held() const {
    std::vector<Tensor> first, other;
    for (const Tensor& g : first_) {
      if (g.defined()) first.push_back(g);
    }
    if (momentum_sq_.defined()) other.push_back(momentum_sq_);
    if (device_) other.push_back(device_->memory());
    return {arenas_, first, other, tables_.n_bytes()};
  }

  // Whether the parameters of all groups and their layouts are what the plan was built on.
  bool fits(const py::list& groups) const {
    size_t t = 0;
    for (const py::handle group : groups) {
      const py::list params = group["params"];
      for (const py::handle p : params) {
        if (t == params_.size() || p.ptr() != PyList_GET_ITEM(objects_.ptr(), static_cast<Py_ssize_t>(t++)))
          return false;
      }
    }
    return t == params_.size() && changed_layout() == t;
  }

  // Whether the base's state is what the plan was bound to.
  bool holds(const py::dict& state) const { return bound_.matches(state); }

  void bind_state(const py::dict& state, std::vector<py::str> keys) {
    bound_.bind(state, std::move(keys));
    std::unordered_map<PyObject*, size_t> index;
    for (size_t t = 0; t < params_.size(); ++t) index[PyList_GET_ITEM(objects_.ptr(), static_cast<Py_ssize_t>(t))] = t;
    momentum_sq_known_ = false;
    std::vector<Tensor>* rows[] = {&state1_, &state2_, &step_};
    for (std::vector<Tensor>* row : rows) row->assign(params_.size(), Tensor());
    bound_.for_each([&](PyObject* param, size_t key, const Tensor& value) {
      const auto found = index.find(param);
      if (found != index.end()) (*rows[key])[found->second] = value;
    });
  }

  void bind_cache(size_t index, std::optional<Tensor> cache) { cache_.at(index) = std::move(cache).value_or(Tensor()); }

  // Bits of the mask of one tensor, in the order of its memory; none: every entry is perturbed.
  void bind_mask(size_t index, std::optional<Tensor> bits) {
    if (bits) {
      const int64_t n_bytes = mask_bytes(params_.at(index).numel());
      TORCH_CHECK_VALUE(bits->scalar_type() == at::kByte && bits->is_contiguous() && bits->numel() == n_bytes &&
                            bits->device() == params_[index].device(),
                        "the mask of parameter ", index, " must be contiguous uint8 with ", n_bytes, " entries on ",
                        params_[index].device(), ", got ", bits->scalar_type(), " ", bits->sizes(), " on ",
                        bits->device());
      TORCH_CHECK_VALUE(begins_a_word(bits->const_data_ptr()), "the mask of parameter ", index,
                        " must begin at a multiple of 4 bytes; pass a copy");
    }
    mask_.at(index) = bits.value_or(Tensor());
  }

  // The running average of one tensor; none: it has none.
  void bind_average(size_t index, std::optional<Tensor> average) {
    if (average) {
      const Tensor& p = params_.at(index);
      const at::ScalarType dtype = p.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      TORCH_CHECK_VALUE(average->scalar_type() == dtype && average->device() == p.device() && same_layout(*average, p),
                        "the average of parameter ", index, " must be ", dtype, " of shape ", p.sizes(),
                        " with strides ", p.strides(), " on ", p.device(), ", got ", average->scalar_type(), " ",
                        average->sizes(), " ", average->strides(), " on ", average->device());
    }
    average_.at(index) = std::move(average).value_or(Tensor());
  }

  // Tensors that have a gradient and, in groups that need it, no state of the base optimizer yet.
  std::vector<size_t> missing_state(const std::vector<bool>& needed) const {
    return with_gradient([&](size_t t) { return needed[tables_.view.group[t]] && !state1_[t].defined(); });
  }

  std::vector<size_t> missing_cache() const {
    return with_gradient([&](size_t t) { return !cache_[t].defined(); });
  }

  // Perturbs the weights and takes the gradients away from the parameters, so that the next backward does not add to
  // them: one native call, so that an interrupt sees either both or neither. With `keep` the gradients stay alive, for
  // a mix that reads them and to be put back by restore().
  void perturb(const std::vector<ClimbTuple>& climbs, bool keep, const Tensor& report, const ScalingTuple& scaling,
               bool renormalise) {
    std::vector<Tensor> copies;
    bind_weights();
    bind_gradients(tables_.view.first, /*written=*/false, copies);
    climb(climbs, {.scaling = scaling_of(scaling), .renormalise = renormalise}, report);
    gave_gradients_ = true;
    for (size_t t = 0; t < params_.size(); ++t) {
      Tensor& grad = params_[t].mutable_grad();
      if (keep) {
        first_[t] = std::move(grad);
      } else {
        grad.reset();
      }
    }
  }

  // The same against the first moments, which an update leaves with their sums of squares. Gradients stay.
  void perturb_along_momentum(const std::vector<ClimbTuple>& climbs, const Tensor& report, bool renormalise) {
    if (!momentum_sq_.defined()) momentum_sq_ = at::zeros({n_tensors()}, cache_norm_.options());
    bind_weights();
    uint64_t versions = 0;  // kernels do not count theirs: one more is a write of somebody else's
    for (size_t t = 0; t < params_.size(); ++t) {
      if (state1_[t].defined() && !state1_[t].is_inference()) versions += state1_[t]._version();
    }
    if (std::exchange(momentum_versions_, versions) != versions) momentum_sq_known_ = false;
    for (size_t t = 0; t < params_.size(); ++t) {
      const bool moves = state1_[t].defined() && params_[t].requires_grad();
      tables_.view.first[t] = moves ? operand(state1_[t]) : Operand{};
      if (moves != moves_[t]) momentum_sq_known_ = false;  // it was frozen or is no longer
      moves_[t] = moves;
    }
    const bool plain = std::all_of(climbs.begin(), climbs.end(), [](const ClimbTuple& climb) {
      const auto how = static_cast<Climb>(std::get<0>(climb));
      return how == Climb::kEuclidean || how == Climb::kSign;
    });
    const bool known = momentum_sq_known_ && plain && !renormalise && !is_partial();
    climb(climbs,
          {.renormalise = renormalise,
           .along_momentum = true,
           .momentum_sq = known ? momentum_sq_.const_data_ptr<double>() : nullptr},
          report);
    if (known || momentum_sq_known_ || is_partial()) return;
    copy_sums(kAA, momentum_sq_);
    momentum_sq_known_ = true;
  }

  // The same along noise, by the norms of the weights. While they are perturbed so, another draw starts from the saved
  // ones.
  void perturb_by_noise(const std::vector<ClimbTuple>& climbs, const Tensor& report, const NoiseTuple& noise) {
    PlanView& plan = tables_.view;
    const std::vector<ClimbGroup> groups = groups_of(climbs);
    std::vector<Climb> kinds;
    for (const ClimbGroup& group : groups) kinds.push_back(group.climb);
    const bool another = perturbed_, known = another && kinds == noise_kinds_;
    bind_weights();
    if (!another) {
      for (size_t t = 0; t < params_.size(); ++t) plan.first[t] = params_[t].requires_grad() ? plan.w[t] : Operand{};
      bind_saved(groups);
    }
    bind_masks();
    tables_.use_filters();
    NoiseOptions options{.climbs = groups.data(),
                         .n_groups = static_cast<int32_t>(groups.size()),
                         .from_saved = another,
                         .norms_known = known,
                         .report = report.mutable_data_ptr<double>()};
    options.seed = PyLong_AsUnsignedLongLongMask(std::get<0>(noise).ptr());
    options.t = std::get<1>(noise);
    options.draw = std::get<2>(noise);
    const Tensor table = table_of(groups, options.climb_table);
    {
      py::gil_scoped_release unlocked;
      if (device_) {
        device_functions()->perturb_by_noise(device_->upload(plan), options, index());
      } else {
        cpu::perturb_by_noise(plan, options, torch_pool());
      }
    }
    noise_kinds_ = std::move(kinds);
    perturbed_ = true;
    for (const Tensor& p : params_) bump_version(p);
  }

  // Undoes perturb(): weights bitwise, gradients if they were kept.
  void restore() {
    if (!perturbed_) return;
    bind_weights();
    {
      py::gil_scoped_release unlocked;
      if (device_) {
        device_functions()->restore(device_->upload(tables_.view), index());
      } else {
        cpu::restore(tables_.view, torch_pool());
      }
    }
    for (size_t t = 0; gave_gradients_ && t < params_.size(); ++t) params_[t].mutable_grad() = first_[t];
    finish();
  }

  void update(int32_t base, const std::vector<BaseTuple>& base_groups, const MixTuple& mix, bool looked, bool check,
              double max_grad_norm, const Tensor& report, const ScalingTuple& scaling,
              const std::optional<AverageTuple>& average) {
    const auto& [kind, scope, min_sine, alpha, weights] = mix;
    UpdateOptions options;
    options.base = static_cast<Base>(base);
    if (average) options.average = average_of(*average, options.base);
    options.looked = looked;
    options.check = check;
    options.restores = perturbed_;
    options.mix = {static_cast<Mix>(kind), static_cast<Scope>(scope), min_sine, cache_norm_.mutable_data_ptr<double>(),
                   weights_of(weights)};
    options.scaling = scaling_of(scaling);
    options.max_grad_norm = max_grad_norm;
    options.report = report.mutable_data_ptr<double>();
    options.skips = skips_.mutable_data_ptr<int64_t>();
    if (options.base == Base::kNone) {
      momentum_sq_known_ = false;  // somebody else writes the moments
    } else if (momentum_sq_.defined()) {
      options.momentum_sq = momentum_sq_.mutable_data_ptr<double>();
    }
    std::vector<BaseGroup> groups;
    for (const auto& [lr, weight_decay, momentum, dampening, nesterov, beta1, beta2, eps, on_device] : base_groups) {
      groups.push_back(
          {scalar(lr, on_device, "lr"), weight_decay, momentum, dampening, nesterov, beta1, beta2, eps, /*alpha=*/0});
    }
    groups.resize(std::max(groups.size(), alpha.size()));
    for (size_t g = 0; g < alpha.size(); ++g) groups[g].alpha = alpha[g];
    options.groups = groups.data();
    options.n_groups = static_cast<int32_t>(groups.size());
    const Tensor table = table_of(groups, options.group_table);
    const bool mixes = adds_cache(options.mix.mix) || options.mix.mix == Mix::kBlend;
    const bool changes_u = max_grad_norm > 0 || mixes || options.scaling.grad_scale != nullptr;
    options.hands_over = options.base == Base::kNone && changes_u;
    const bool adam = options.base == Base::kAdam || options.base == Base::kAdamW;
    PlanView& plan = tables_.view;
    std::vector<Tensor> copies;
    bind_weights();
    // A gradient at w is always bound in its own row, so that tables change no more than gradients move.
    Operand* const grads = looked ? plan.grad : plan.first;
    bind_gradients(grads, options.hands_over, copies);
    if (options.base == Base::kNone) std::copy_n(grads, params_.size(), plan.out);
    const bool reads_first = fills_cache(options.mix.mix) || options.mix.mix == Mix::kBlend;
    if (reads_first) bind_first(copies);
    if (fills_cache(options.mix.mix) || adds_cache(options.mix.mix)) bind_row(plan.cache, cache_);
    if (options.base != Base::kNone) bind_row(plan.state1, state1_);
    if (adam) bind_row(plan.state2, state2_);
    if (adam) bind_row(plan.step, step_);
    if (average) bind_row(plan.average, average_);
    {
      py::gil_scoped_release unlocked;
      PlanView view = device_ ? device_->upload(plan) : plan;
      if (!looked) view.grad = view.first;
      if (looked && !reads_first && momentum_sq_.defined()) {
        PlanView read = plan;
        read.first = plan.grad;  // moments are left there, of another dtype than half types, but nothing reads them
        view.common_dtype = common_dtype(read);
      }
      const AfterSums add_up = [&] { add_other_processes(view); };
      if (is_partial()) options.after_sums = &add_up;
      if (device_) {
        device_functions()->update(view, options, index());
      } else {
        cpu::update(view, options, torch_pool());
      }
    }
    finish();
  }

 private:
  int index() const { return params_[0].get_device(); }
  int64_t n_tensors() const { return static_cast<int64_t>(params_.size()); }

  std::vector<ClimbGroup> groups_of(const std::vector<ClimbTuple>& climbs) const {
    std::vector<ClimbGroup> groups;
    for (const auto& [climb, rho, eta, trust_clip, on_device] : climbs) {
      groups.push_back({static_cast<Climb>(climb), scalar(rho, on_device, "rho"), eta, trust_clip});
    }
    return groups;
  }

  // Saves the weights and moves them by the directions in plan.first.
  void climb(const std::vector<ClimbTuple>& climbs, PerturbOptions options, const Tensor& report) {
    const std::vector<ClimbGroup> groups = groups_of(climbs);
    if (std::any_of(groups.begin(), groups.end(), [](const ClimbGroup& g) { return g.climb == Climb::kFilter; })) {
      tables_.use_filters();
    }
    PlanView& plan = tables_.view;
    bind_saved(groups);
    bind_masks();
    options.climbs = groups.data();
    options.n_groups = static_cast<int32_t>(groups.size());
    options.report = report.mutable_data_ptr<double>();
    const Tensor table = table_of(groups, options.climb_table);
    {
      py::gil_scoped_release unlocked;
      const PlanView view = device_ ? device_->upload(plan) : plan;
      const AfterSums add_up = [&] { add_other_processes(view); };
      if (is_partial()) options.after_sums = &add_up;
      if (device_) {
        device_functions()->perturb(view, options, index());
      } else {
        cpu::perturb(view, options, torch_pool());
      }
    }
    perturbed_ = true;
    for (const Tensor& p : params_) bump_version(p);
  }

  // Whether every tensor is a part of one that several processes have.
  bool is_partial() const { return !add_up_.is_none(); }

  void add_other_processes(const PlanView& view) {
    const int64_t n = n_tensors() + 1;
    const Tensor sums = device_ ? device_->workspace(view.sums, kCC * n)
                                : at::from_blob(view.sums, {kCC * n}, at::TensorOptions(at::kDouble));
    const py::gil_scoped_acquire locked;
    add_up_(sums.view({kCC, n}));
  }

  // A row of plan.sums, as the latest pass left it.
  void copy_sums(Sum which, Tensor& to) {
    if (device_) {
      to.copy_(device_->workspace(device_->upload(tables_.view).sums_of(which), to.numel()));
    } else {
      std::copy_n(tables_.view.sums_of(which), to.numel(), to.mutable_data_ptr<double>());
    }
  }

  const double* weights_of(const std::optional<Tensor>& weights) const {
    if (!weights) return nullptr;
    TORCH_CHECK_VALUE(weights->scalar_type() == at::kDouble && weights->is_contiguous() &&
                          weights->numel() == n_tensors() && weights->device() == params_[0].device(),
                      "weights must be contiguous float64 with ", n_tensors(), " entries on ", params_[0].device(),
                      ", got ", weights->scalar_type(), " ", weights->sizes(), " on ", weights->device());
    return weights->const_data_ptr<double>();
  }

  AverageOptions average_of(const AverageTuple& average, Base base) const {
    const auto& [taken, decay, warmup] = average;
    TORCH_CHECK_VALUE(base != Base::kNone, "an update takes weights into averages only with a fused base");
    TORCH_CHECK_VALUE(taken.scalar_type() == at::kLong && taken.numel() == 1 && taken.device() == params_[0].device(),
                      "taken must be an int64 tensor of one entry on ", params_[0].device(), ", got ",
                      taken.scalar_type(), " ", taken.sizes(), " on ", taken.device());
    return {taken.mutable_data_ptr<int64_t>(), !decay, decay.value_or(0), warmup};
  }

  Scalar scalar(double host, const std::optional<Tensor>& on_device, const char* name) const {
    return {host, device_scalar(on_device, name)};
  }

  Scaling scaling_of(const ScalingTuple& scaling) const {
    const auto& [grad_scale, found_inf] = scaling;
    return {device_scalar(grad_scale, "grad_scale"), device_scalar(found_inf, "found_inf")};
  }

  // Where a kernel finds the one number of x; null without x.
  const float* device_scalar(const std::optional<Tensor>& x, const char* name) const {
    if (!x) return nullptr;
    TORCH_CHECK_VALUE(x->scalar_type() == at::kFloat && x->numel() == 1 && x->device() == params_[0].device(), name,
                      " must be a float32 tensor of one entry on ", params_[0].device(), ", got ", x->scalar_type(),
                      " ", x->sizes(), " on ", x->device());
    return x->const_data_ptr<float>();
  }

  // A number that only the device knows may be positive.
  static bool is_positive(const Scalar& x) { return x.device != nullptr || x.host > 0; }

  // A copy of the groups on the device, if a launch cannot carry them.
  template <typename Group>
  Tensor table_of(const std::vector<Group>& groups, const Group*& table) const {
    if (!device_ || groups.size() <= static_cast<size_t>(kCarriedGroups)) return {};
    TORCH_CHECK(!device_functions()->is_capturing(index()), "a graph cannot be recorded with more than ",
                kCarriedGroups, " param groups, got ", groups.size());
    const auto n_bytes = static_cast<int64_t>(groups.size() * sizeof(Group));
    Tensor copy = at::from_blob(const_cast<Group*>(groups.data()), {n_bytes}, at::kByte).to(params_[0].device());
    table = reinterpret_cast<const Group*>(copy.const_data_ptr());
    return copy;
  }

  // A parameter whose layout is no longer what the tables say, or their number.
  size_t changed_layout() const {
    std::atomic<size_t> changed{params_.size()};
    for_tensors(params_.size(), [&](size_t t) {
      if (!layouts_.hold(t, params_[t])) changed = t;
    });
    return changed;
  }

  template <typename Wanted>
  std::vector<size_t> with_gradient(const Wanted& wanted) const {
    std::vector<size_t> found;
    for (size_t t = 0; t < params_.size(); ++t) {
      if (wanted(t) && params_[t].grad().defined()) found.push_back(t);
    }
    if (!found.empty()) check_gradients();  // before anything is created for them
    return found;
  }

  void check_gradients() const {
    for (size_t t = 0; t < params_.size(); ++t) {
      if (params_[t].grad().defined() && !is_usable(params_[t].grad())) refuse_gradient(t);
    }
  }

  [[noreturn]] void refuse_gradient(size_t t) const {
    const Tensor& grad = params_[t].grad();
    throw py::type_error("the gradient of parameter " + std::to_string(t) + ", shape " + c10::str(grad.sizes()) +
                         ", is " + c10::str(grad.layout()) + " " + c10::str(grad.scalar_type()) +
                         "; samkern needs dense real gradients (for embeddings: sparse=False)");
  }

  static bool is_usable(const Tensor& grad) {
    return grad.layout() == at::kStrided && is_supported(grad.scalar_type());
  }

  void bind_weights() {
    const size_t changed = changed_layout();
    if (changed < params_.size()) {
      throw std::runtime_error("parameter " + std::to_string(changed) +
                               " changed its dtype, shape or strides while perturbed, and cannot be restored");
    }
    for_tensors(params_.size(), [&](size_t t) { tables_.view.w[t] = operand(params_[t]); });
  }

  // Gradients as autograd left them. One that is written must share the parameter's layout: a copy that does replaces
  // it. Of another that does not, a copy is read, which is left in `copies`. On one thread: this one has just made
  // them, and has their headers in its cache.
  void bind_gradients(Operand* row, bool written, std::vector<Tensor>& copies) {
    for (size_t t = 0; t < params_.size(); ++t) {
      const Tensor& p = params_[t];
      Tensor& grad = p.mutable_grad();
      row[t] = {};
      if (!grad.defined()) continue;
      if (!is_usable(grad)) refuse_gradient(t);
      if (written && !same_layout(grad, p)) {
        grad = at::empty_strided(p.sizes(), p.strides(), grad.options()).copy_(grad);
      }
      row[t] = operand_like(grad, p, copies);
    }
  }

  void bind_first(std::vector<Tensor>& copies) {
    for (size_t t = 0; t < params_.size(); ++t) {
      Operand& first = tables_.view.first[t];
      first = first_[t].defined() ? operand_like(first_[t], params_[t], copies) : Operand{};
    }
  }

  void bind_row(Operand* row, const std::vector<Tensor>& tensors) {
    for_tensors(tensors.size(), [&](size_t t) { row[t] = tensors[t].defined() ? operand(tensors[t]) : Operand{}; });
  }

  void bind_masks() {
    for_tensors(mask_.size(), [&](size_t t) {
      const bool is_masked = mask_[t].defined() && tables_.view.numel[t] > 0;
      tables_.view.mask[t] = {is_masked ? mask_[t].data_ptr() : nullptr, Dtype::kFloat32};
    });
  }

  // Room for the saved weights of every tensor that is about to be perturbed, kept from step to step.
  void bind_saved(const std::vector<ClimbGroup>& groups) {
    constexpr int64_t kAlign = 64;
    PlanView& plan = tables_.view;
    auto perturbs = [&](size_t t) {
      return plan.first[t].address != nullptr && plan.numel[t] > 0 && is_positive(groups.at(plan.group[t]).rho);
    };
    auto room = [&](size_t t) { return (plan.numel[t] * size_of(plan.w[t].dtype) + kAlign - 1) / kAlign * kAlign; };
    int64_t n_bytes = 0;
    for (size_t t = 0; t < params_.size(); ++t) n_bytes += perturbs(t) && slots_[t] == nullptr ? room(t) : 0;
    if (n_bytes > 0) {
      arenas_.push_back(at::empty({n_bytes}, params_[0].options().dtype(at::kByte)));
      auto* next = static_cast<char*>(arenas_.back().mutable_data_ptr());
      for (size_t t = 0; t < params_.size(); ++t) {
        if (!perturbs(t) || slots_[t] != nullptr) continue;
        slots_[t] = next;
        next += room(t);
      }
    }
    for (size_t t = 0; t < params_.size(); ++t) {
      plan.saved[t] = {perturbs(t) ? slots_[t] : nullptr, plan.w[t].dtype};
    }
  }

  void finish() {
    for_tensors(params_.size(), [&](size_t t) { bump_version(params_[t]); });
    if (gave_gradients_) first_.assign(params_.size(), Tensor());
    perturbed_ = gave_gradients_ = false;
    noise_kinds_.clear();
  }

  py::list objects_;
  std::vector<Tensor> params_;
  Tables tables_;
  std::optional<DeviceTables> device_;
  Layouts layouts_;
  std::vector<Tensor> first_, state1_, state2_, step_, cache_, mask_, average_;
  std::vector<bool> moves_;  // along its momentum
  std::vector<void*> slots_;
  std::vector<Tensor> arenas_;
  BoundState bound_;
  Tensor cache_norm_, fresh_, skips_;
  // Sums of squares of state1_, from the first climb along the momentum on.
  Tensor momentum_sq_;
  bool momentum_sq_known_ = false;
  py::object add_up_ = py::none();
  uint64_t momentum_versions_ = 0;
  std::vector<Climb> noise_kinds_;  // of the groups, whose norms are known while weights are perturbed by noise
  bool perturbed_ = false, gave_gradients_ = false;
};

}  // namespace
}  // namespace samkern

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using samkern::Plan;
  m.doc() = "Native side of samkern: list ops in torch.ops.samkern, and the Plan.";
  TORCH_INTERNAL_ASSERT(samkern::kReportFields.size() == samkern::kNReport);
  m.attr("report_fields") = py::tuple(py::cast(samkern::kReportFields));
  m.def("lists_fit", samkern::lists_fit);
  m.def("use_device_functions", [](const std::optional<py::capsule>& functions) {
    samkern::use_device_functions(functions ? functions->get_pointer<samkern::DeviceFunctions>() : nullptr);
  });
  py::class_<Plan>(m, "Plan")
      .def(py::init<const py::list&, std::vector<int32_t>, at::Tensor, at::Tensor, at::Tensor, bool>(),
           py::arg("params"), py::arg("group"), py::arg("cache_norm"), py::arg("fresh"), py::arg("skips"),
           py::arg("on_device") = false)
      .def_property_readonly("perturbed", &Plan::perturbed)
      .def("add_up_with", &Plan::add_up_with, py::arg("add_up").none(true))
      .def("held", &Plan::held)
      .def("fits", &Plan::fits)
      .def("holds", &Plan::holds)
      .def("bind_state", &Plan::bind_state)
      .def("bind_cache", &Plan::bind_cache)
      .def("bind_mask", &Plan::bind_mask)
      .def("bind_average", &Plan::bind_average)
      .def("missing_state", &Plan::missing_state)
      .def("missing_cache", &Plan::missing_cache)
      .def("perturb", &Plan::perturb, py::arg("climbs"), py::arg("keep"), py::arg("report"),
           py::arg("scaling") = samkern::ScalingTuple(), py::arg("renormalise") = false)
      .def("perturb_along_momentum", &Plan::perturb_along_momentum, py::arg("climbs"), py::arg("report"),
           py::arg("renormalise") = false)
      .def("perturb_by_noise", &Plan::perturb_by_noise, py::arg("climbs"), py::arg("report"), py::arg("noise"))
      .def("restore", &Plan::restore)
      .def("update", &Plan::update, py::arg("base"), py::arg("groups"), py::arg("mix"), py::arg("looked"),
           py::arg("check"), py::arg("max_grad_norm"), py::arg("report"), py::arg("scaling") = samkern::ScalingTuple(),
           py::arg("average") = std::nullopt);
}
