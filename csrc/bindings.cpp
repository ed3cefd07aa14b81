// samkern._C: the Plan, which holds the tensor lists of one optimizer between steps and runs its half-steps.
#include <torch/extension.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/launchers.h"
#include "tables.h"

namespace py = pybind11;

namespace samkern {
namespace {

using at::Tensor;
using ClimbTuple = std::tuple<int32_t, double, double, double>;  // climb, rho, eta, trust_clip
using BaseTuple = std::tuple<double, double, double, double, bool, double, double, double>;
using MixTuple =
    std::tuple<int32_t, int32_t, double, std::vector<double>>;  // mix, scope, min_sine, alpha of each group

const std::vector<std::string> kReportFields = {"grad_norm",     "second_norm",    "update_norm",   "perturb_norm",
                                                "realised_norm", "realised_share", "skipped_first", "skipped_second"};

void bump_version(const Tensor& x) {
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

// State of the base optimizer as its Python dicts hold it. Strong references: a pointer that compares equal is the
// object.
class BoundState {
 public:
  void bind(const py::dict& state, std::vector<py::str> keys) {
    keys_ = std::move(keys);
    entries_.clear();
    for (const auto& [param, values] : state) {
      Entry entry{py::reinterpret_borrow<py::object>(param), py::reinterpret_borrow<py::object>(values), {}};
      for (const py::str& key : keys_) entry.tensors.push_back(lookup(entry.values.ptr(), key.ptr()));
      entries_.push_back(std::move(entry));
    }
  }

  // Whether `state` still holds the same dicts with the same tensors, in the same order.
  bool matches(const py::dict& state) const {
    if (keys_.empty()) return true;
    size_t i = 0;
    for (const auto& [param, values] : state) {
      if (i == entries_.size()) return false;
      const Entry& entry = entries_[i++];
      if (param.ptr() != entry.param.ptr() || values.ptr() != entry.values.ptr()) return false;
      for (size_t k = 0; k < keys_.size(); ++k) {
        if (PyDict_GetItemWithError(values.ptr(), keys_[k].ptr()) != entry.tensors[k].ptr()) return false;
      }
    }
    return i == entries_.size();
  }

  // Calls body(param, key number, tensor) for everything that is there.
  template <typename Body>
  void for_each(const Body& body) const {
    for (const Entry& entry : entries_) {
      for (size_t k = 0; k < keys_.size(); ++k) {
        if (entry.tensors[k]) body(entry.param.ptr(), k, entry.tensors[k].cast<Tensor>());
      }
    }
  }

 private:
  struct Entry {
    py::object param, values;
    std::vector<py::object> tensors;
  };

  static py::object lookup(PyObject* values, PyObject* key) {
    return PyDict_Check(values) ? py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(values, key))
                                : py::object();
  }

  std::vector<py::str> keys_;
  std::vector<Entry> entries_;
};

// The tensor lists of one optimizer on the CPU. Addresses are read anew in every call, since gradients move with
// zero_grad() and weights may; what Python replaced behind the plan's back is found by matches().
class Plan {
 public:
  Plan(const py::list& params, std::vector<int32_t> group, Tensor cache_norm, Tensor fresh, Tensor skips)
      : objects_(params),
        params_(params.cast<std::vector<Tensor>>()),
        tables_(params_, std::move(group)),
        first_(params_.size()),
        state1_(params_.size()),
        state2_(params_.size()),
        step_(params_.size()),
        cache_(params_.size()),
        slots_(params_.size(), nullptr),
        cache_norm_(std::move(cache_norm)),
        fresh_(std::move(fresh)),
        skips_(std::move(skips)) {
    for (const Tensor& p : params_) layouts_.push_back({p.scalar_type(), p.sizes().vec(), p.strides().vec()});
    tables_.view.fresh = fresh_.mutable_data_ptr<uint8_t>();
  }

  bool perturbed() const { return perturbed_; }

  // Whether the parameters of all groups, their layouts and the bound state are what the plan was built on.
  bool matches(const py::list& groups, const py::dict& state) const {
    size_t t = 0;
    for (const py::handle group : groups) {
      const py::list params = group["params"];
      for (const py::handle p : params) {
        if (t == params_.size() || p.ptr() != PyList_GET_ITEM(objects_.ptr(), static_cast<Py_ssize_t>(t))) return false;
        if (!layout_holds(t++)) return false;
      }
    }
    return t == params_.size() && bound_.matches(state);
  }

  void bind_state(const py::dict& state, std::vector<py::str> keys) {
    bound_.bind(state, std::move(keys));
    std::unordered_map<PyObject*, size_t> index;
    for (size_t t = 0; t < params_.size(); ++t) index[PyList_GET_ITEM(objects_.ptr(), static_cast<Py_ssize_t>(t))] = t;
    std::vector<Tensor>* rows[] = {&state1_, &state2_, &step_};
    for (std::vector<Tensor>* row : rows) row->assign(params_.size(), Tensor());
    bound_.for_each([&](PyObject* param, size_t key, const Tensor& value) {
      const auto found = index.find(param);
      if (found != index.end()) (*rows[key])[found->second] = value;
    });
  }

  void bind_cache(size_t index, Tensor cache) { cache_.at(index) = std::move(cache); }

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
  void perturb(const std::vector<ClimbTuple>& climbs, bool keep, const Tensor& report) {
    std::vector<ClimbGroup> groups;
    for (const auto& [climb, rho, eta, trust_clip] : climbs) {
      groups.push_back({static_cast<Climb>(climb), rho, eta, trust_clip});
      if (groups.back().climb == Climb::kFilter) tables_.use_filters();
    }
    PlanView& plan = tables_.view;
    copies_.clear();
    bind_weights();
    bind_gradients(plan.first, /*written=*/false);
    bind_saved(groups);
    {
      py::gil_scoped_release unlocked;
      cpu::perturb(plan, {.climbs = groups.data(), .report = report.mutable_data_ptr<double>()}, torch_pool());
    }
    perturbed_ = true;
    written();
    for (size_t t = 0; t < params_.size(); ++t) {
      if (keep) first_[t] = params_[t].grad();
      params_[t].mutable_grad() = Tensor();
    }
  }

  // Undoes perturb(): weights bitwise, gradients if they were kept.
  void restore() {
    if (!perturbed_) return;
    for (size_t t = 0; t < params_.size(); ++t) {
      if (!layout_holds(t)) {
        throw std::runtime_error("parameter " + std::to_string(t) +
                                 " changed its dtype, shape or strides while perturbed, and cannot be restored");
      }
    }
    bind_weights();
    {
      py::gil_scoped_release unlocked;
      cpu::restore(tables_.view, torch_pool());
    }
    for (size_t t = 0; t < params_.size(); ++t) params_[t].mutable_grad() = first_[t];
    finish();
  }

  void update(int32_t base, const std::vector<BaseTuple>& base_groups, const MixTuple& mix, bool looked, bool check,
              double max_grad_norm, const Tensor& report) {
    const auto& [kind, scope, min_sine, alpha] = mix;
    cpu::UpdateOptions options;
    options.base = static_cast<Base>(base);
    options.looked = looked;
    options.check = check;
    options.mix = {static_cast<Mix>(kind), static_cast<Scope>(scope), min_sine, alpha.data(),
                   cache_norm_.mutable_data_ptr<double>()};
    options.max_grad_norm = max_grad_norm;
    options.report = report.mutable_data_ptr<double>();
    options.skips = skips_.mutable_data_ptr<int64_t>();
    std::vector<BaseGroup> groups;
    for (const auto& [lr, weight_decay, momentum, dampening, nesterov, beta1, beta2, eps] : base_groups) {
      groups.push_back({lr, weight_decay, momentum, dampening, nesterov, beta1, beta2, eps});
    }
    options.groups = groups.data();

    const bool hands_over = options.base == Base::kNone && (max_grad_norm > 0 || options.mix.mix == Mix::kReuse);
    PlanView& plan = tables_.view;
    copies_.clear();
    bind_weights();
    bind_gradients(plan.grad, hands_over);
    for (size_t t = 0; t < params_.size(); ++t) {
      plan.out[t] = hands_over ? plan.grad[t] : Operand{};
      plan.first[t] = first_[t].defined() ? operand_like(first_[t], params_[t], copies_) : Operand{};
    }
    bind_row(plan.cache, cache_);
    bind_row(plan.state1, state1_);
    bind_row(plan.state2, state2_);
    for (size_t t = 0; t < params_.size(); ++t) plan.step[t] = step_[t].defined() ? operand(step_[t]) : Operand{};
    {
      py::gil_scoped_release unlocked;
      cpu::update(plan, options, torch_pool());
    }
    for (const auto* row : {&cache_, &state1_, &state2_, &step_}) {
      for (const Tensor& x : *row) {
        if (x.defined()) bump_version(x);
      }
    }
    finish();
  }

 private:
  struct Layout {
    at::ScalarType dtype;
    std::vector<int64_t> sizes, strides;
  };

  bool layout_holds(size_t t) const {
    const Tensor& p = params_[t];
    return p.scalar_type() == layouts_[t].dtype && p.sizes() == at::IntArrayRef(layouts_[t].sizes) &&
           p.strides() == at::IntArrayRef(layouts_[t].strides);
  }

  template <typename Wanted>
  std::vector<size_t> with_gradient(const Wanted& wanted) const {
    std::vector<size_t> found;
    for (size_t t = 0; t < params_.size(); ++t) {
      if (params_[t].grad().defined() && wanted(t)) found.push_back(t);
    }
    return found;
  }

  // The caller has seen matches(), or checks layouts itself.
  void bind_weights() {
    for (size_t t = 0; t < params_.size(); ++t) tables_.view.w[t] = operand(params_[t]);
  }

  // Gradients as autograd left them. One that is written must share the parameter's layout: a copy that does replaces
  // it.
  void bind_gradients(Operand* row, bool written) {
    for (size_t t = 0; t < params_.size(); ++t) {
      const Tensor& p = params_[t];
      Tensor& grad = p.mutable_grad();
      row[t] = {};
      if (!grad.defined()) continue;
      if (grad.layout() != at::kStrided || !is_supported(grad.scalar_type())) {
        throw py::type_error("the gradient of parameter " + std::to_string(t) + ", shape " + c10::str(grad.sizes()) +
                             ", is " + c10::str(grad.layout()) + " " + c10::str(grad.scalar_type()) +
                             "; samkern needs dense real gradients (for embeddings: sparse=False)");
      }
      if (written && !same_layout(grad, p))
        grad = at::empty_strided(p.sizes(), p.strides(), grad.options()).copy_(grad);
      row[t] = operand_like(grad, p, copies_);
    }
  }

  void bind_row(Operand* row, const std::vector<Tensor>& tensors) {
    for (size_t t = 0; t < tensors.size(); ++t) row[t] = tensors[t].defined() ? operand(tensors[t]) : Operand{};
  }

  // Room for the saved weights of every tensor that is about to be perturbed, kept from step to step.
  void bind_saved(const std::vector<ClimbGroup>& groups) {
    constexpr int64_t kAlign = 64;
    PlanView& plan = tables_.view;
    auto perturbs = [&](size_t t) {
      return plan.first[t].address != nullptr && plan.numel[t] > 0 && groups.at(plan.group[t]).rho > 0;
    };
    auto room = [&](size_t t) { return (params_[t].nbytes() + kAlign - 1) / kAlign * kAlign; };
    size_t n_bytes = 0;
    for (size_t t = 0; t < params_.size(); ++t) n_bytes += perturbs(t) && slots_[t] == nullptr ? room(t) : 0;
    if (n_bytes > 0) {
      arenas_.push_back(at::empty({static_cast<int64_t>(n_bytes)}, at::kByte));
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

  void written() {
    for (const Tensor& p : params_) bump_version(p);
  }

  void finish() {
    perturbed_ = false;
    written();
    first_.assign(params_.size(), Tensor());
    for (size_t t = 0; t < params_.size(); ++t) tables_.view.saved[t] = {};
  }

  py::list objects_;
  std::vector<Tensor> params_;
  Tables tables_;
  std::vector<Layout> layouts_;
  std::vector<Tensor> first_, state1_, state2_, step_, cache_;
  std::vector<void*> slots_;
  std::vector<Tensor> arenas_, copies_;
  BoundState bound_;
  Tensor cache_norm_, fresh_, skips_;
  bool perturbed_ = false;
};

}  // namespace
}  // namespace samkern

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using samkern::Plan;
  m.doc() = "Native side of samkern: list ops in torch.ops.samkern, and the Plan.";
  TORCH_INTERNAL_ASSERT(samkern::kReportFields.size() == samkern::kNReport);
  m.attr("report_fields") = py::tuple(py::cast(samkern::kReportFields));
  py::class_<Plan>(m, "Plan")
      .def(py::init<const py::list&, std::vector<int32_t>, at::Tensor, at::Tensor, at::Tensor>(), py::arg("params"),
           py::arg("group"), py::arg("cache_norm"), py::arg("fresh"), py::arg("skips"))
      .def_property_readonly("perturbed", &Plan::perturbed)
      .def("matches", &Plan::matches)
      .def("bind_state", &Plan::bind_state)
      .def("bind_cache", &Plan::bind_cache)
      .def("missing_state", &Plan::missing_state)
      .def("missing_cache", &Plan::missing_cache)
      .def("perturb", &Plan::perturb)
      .def("restore", &Plan::restore)
      .def("update", &Plan::update);
}
