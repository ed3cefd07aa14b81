#include "tables.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace samkern {
namespace {

// Fixed work per chunk in elements: thousands of tiny tensors are then shared out by number, large ones by size.
constexpr int64_t kChunkOverhead = 256;

void run_parts(int64_t n_parts, void (*body)(const void*, int64_t), const void* context) {
  at::parallel_for(0, n_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) body(context, part);
  });
}

// Dims of more than one entry in memory order, neighbours that step alike in row-major order taken together; none if
// that is memory order.
std::vector<Dim> order_of(const at::Tensor& like) {
  std::vector<Dim> dims;
  if (like.is_contiguous()) return dims;
  std::vector<std::pair<int64_t, Dim>> strided;
  for (int64_t d = like.dim() - 1, step = 1; d >= 0; step *= like.size(d--)) {
    if (like.size(d) > 1) strided.push_back({like.stride(d), {like.size(d), step}});
  }
  std::sort(strided.begin(), strided.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (const auto& [stride, dim] : strided) {
    if (!dims.empty() && dims.back().step == dim.size * dim.step) {
      dims.back() = {dims.back().size * dim.size, dim.step};
    } else {
      dims.push_back(dim);
    }
  }
  return dims;
}

}  // namespace

cpu::Pool torch_pool() { return {at::get_num_threads(), run_parts}; }

bool is_supported(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::kFloat32;
    case at::kDouble: return Dtype::kFloat64;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "samkern takes float32, float64, bfloat16 and float16 tensors, got ", x.scalar_type());
  }
}

bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return false;
  if (a.strides() == b.strides()) return true;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

bool lists_fit(const std::vector<std::vector<at::Tensor>>& lists, size_t n_written) {
  for (size_t k = 0; k < lists.size(); ++k) {
    if (lists[k].size() != lists[0].size()) return false;
    for (size_t t = 0; t < lists[k].size(); ++t) {
      const at::Tensor &x = lists[k][t], &like = lists[0][t];
      if (x.layout() != at::kStrided || x.device() != lists[0][0].device() || !is_supported(x.scalar_type()))
        return false;
      if (x.sizes() != like.sizes()) return false;
      if (k < n_written && !(x.is_non_overlapping_and_dense() && same_layout(x, like))) return false;
    }
  }
  return true;
}

Operand operand(const at::Tensor& x) {
  static char empty;  // an empty tensor has no memory, but it is there
  return {x.numel() > 0 ? x.mutable_data_ptr() : &empty, dtype_of(x)};
}

Operand operand_like(const at::Tensor& x, const at::Tensor& like, std::vector<at::Tensor>& copies) {
  if (same_layout(x, like)) return operand(x);
  copies.push_back(at::empty_strided(like.sizes(), like.strides(), x.options()).copy_(x));
  return operand(copies.back());
}

int32_t common_dtype(const PlanView& plan) {
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    const Dtype dtype = plan.w[0].dtype;
    auto differs = [&](const Operand& x) { return x.address != nullptr && x.dtype != dtype; };
    if (plan.w[t].dtype != dtype || differs(plan.grad[t]) || differs(plan.first[t])) return -1;
  }
  return plan.n_tensors > 0 ? static_cast<int32_t>(plan.w[0].dtype) : -1;
}

Tables::Tables(at::TensorList like, std::vector<int32_t> group, int64_t chunk)
    : group_(std::move(group)), chunk_(chunk) {
  const auto n = static_cast<int64_t>(like.size());
  first_chunk_.push_back(0);
  chunk_cost_.push_back(0);
  first_dim_.push_back(0);
  for (int64_t t = 0; t < n; ++t) add_tensor(like[t], static_cast<int32_t>(t));

  Operand** rows[] = {&view.w,      &view.grad, &view.first, &view.saved, &view.cache,  &view.state1,
                      &view.state2, &view.step, &view.out,   &view.mask,  &view.average};
  static_assert(std::size(rows) == kNRows);
  operands_.resize(kNRows * n);
  for (size_t row = 0; row < kNRows; ++row) *rows[row] = operands_.data() + row * n;
  for (int64_t t = 0; t < n; ++t) view.w[t].dtype = dtype_of(like[t]);
  fresh_.resize(n);
  view.fresh = fresh_.data();

  view.n_tensors = static_cast<int32_t>(n);
  view.n_chunks = static_cast<int32_t>(chunk_tensor_.size());
  view.n_filter_runs = static_cast<int32_t>(filter_runs_.size());
  view.numel = numel_.data();
  view.flat = flat_.data();
  view.slices = slices_.data();
  view.first_dim = first_dim_.data();
  view.dims = dims_.data();
  view.group = group_.data();
  view.filters = filters_.data();
  view.chunk_tensor = chunk_tensor_.data();
  view.chunk_index = chunk_index_.data();
  view.chunk_cost = chunk_cost_.data();
  view.first_chunk = first_chunk_.data();
  view.filter_runs = filter_runs_.data();

  workspace_.resize(kNSums * view.n_chunks + kNSums * (n + 1) + kNCoeffs * n);
  view.partials = workspace_.data();
  view.sums = view.partials + kNSums * static_cast<int64_t>(view.n_chunks);
  view.coeffs = view.sums + kNSums * (n + 1);
  view.common_dtype = -1;
}

void Tables::use_filters() {
  filter_sums_.resize(2 * n_filters_);
  view.filter_ww = filter_sums_.data();
  view.filter_aa = view.filter_ww + n_filters_;
}

int64_t Tables::n_bytes() const {
  const auto add = [](const auto&... tables) { return (... + (tables.capacity() * sizeof(tables[0]))); };
  return static_cast<int64_t>(add(operands_, fresh_, numel_, flat_, slices_, chunk_cost_, group_, chunk_tensor_,
                                  chunk_index_, first_chunk_, first_dim_, dims_, filters_, filter_runs_, workspace_,
                                  filter_sums_));
}

void Tables::add_tensor(const at::Tensor& like, int32_t index) {
  const int64_t numel = like.numel();
  flat_.push_back(numel_.empty() ? 0 : flat_.back() + numel_.back());
  numel_.push_back(numel);
  slices_.push_back(n_slices_);
  n_slices_ += like.dim() > 0 ? like.size(0) : 1;
  const std::vector<Dim> order = order_of(like);
  dims_.insert(dims_.end(), order.begin(), order.end());
  first_dim_.push_back(static_cast<int32_t>(dims_.size()));
  for (int64_t at = 0; at < numel; at += chunk_) {
    chunk_tensor_.push_back(index);
    chunk_index_.push_back(static_cast<int32_t>(at / chunk_));
    chunk_cost_.push_back(chunk_cost_.back() + kChunkOverhead + std::min(chunk_, numel - at));
  }
  first_chunk_.push_back(static_cast<int32_t>(chunk_tensor_.size()));

  if (like.dim() < 2 || numel == 0) {
    filters_.push_back({0, 0, n_filters_});
    return;
  }
  const int64_t count = like.size(0), stride = count > 1 ? like.stride(0) : numel;
  filters_.push_back({count, stride, n_filters_});
  n_filters_ += count;
  const int64_t per_run = std::max<int64_t>(1, chunk_ / (numel / count));
  for (int64_t first = 0; first < count; first += per_run) {
    filter_runs_.push_back({index, first, std::min(per_run, count - first)});
  }
}

}  // namespace samkern
