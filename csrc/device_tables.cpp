#include "device_tables.h"

#include <algorithm>
#include <cstring>
#include <optional>

namespace samkern {

namespace {

constexpr size_t kAlign = 16;

std::optional<DeviceFunctions> functions;

// Chunks of each block of a grid: runs of about equal work.
std::vector<int32_t> shares(const PlanView& host, int32_t n_blocks) {
  std::vector<int32_t> begin;
  const int64_t* end = host.chunk_cost + host.n_chunks;
  for (int64_t b = 0; b <= n_blocks; ++b) {
    begin.push_back(
        static_cast<int32_t>(std::lower_bound(host.chunk_cost, end, *end * b / n_blocks) - host.chunk_cost));
  }
  return begin;
}

}  // namespace

const DeviceFunctions* device_functions() { return functions ? &*functions : nullptr; }
void use_device_functions(const DeviceFunctions* given) {
  functions = given != nullptr ? std::optional(*given) : std::nullopt;
}
bool is_on_device(const at::Tensor& x) { return x.is_cuda() || (functions && functions->on_host); }

template <typename T>
size_t DeviceTables::reserve(size_t count, const T* values) {
  const size_t at = (image_.size() + kAlign - 1) / kAlign * kAlign;
  image_.resize(at + count * sizeof(T));
  if (values != nullptr) std::memcpy(image_.data() + at, values, count * sizeof(T));
  return at;
}

DeviceTables::DeviceTables(const Tables& tables, at::Device device)
    : device_(device), n_tensors_(tables.view.n_tensors) {
  TORCH_CHECK(functions.has_value(), "samkern._cuda is not loaded");
  // Its replays would copy from pinned memory that others have by then, over tables that are in use.
  TORCH_CHECK(!functions->is_capturing(device.index()),
              "a graph is being recorded, and tables of a new list of tensors cannot be part of it: take some steps "
              "before recording; list ops cannot be recorded");
  const PlanView& host = tables.view;
  const size_t n = n_tensors_, n_chunks = host.n_chunks, n_filters = tables.n_filters();
  sent_.assign(host.w, host.w + kNRows * n);
  view_ = host;
  view_.n_blocks = std::clamp(functions->n_blocks(device.index()), 1, std::max(1, host.n_chunks));
  const std::vector<int32_t> begin = shares(host, view_.n_blocks);

  const size_t rows = reserve<Operand>(kNRows * n, sent_.data());
  const size_t numel = reserve(n, host.numel), group = reserve(n, host.group), filters = reserve(n, host.filters);
  const size_t flat = reserve(n, host.flat), slices = reserve(n, host.slices);
  const size_t first_dim = reserve(n + 1, host.first_dim), dims = reserve(host.first_dim[n], host.dims);
  const size_t chunk_tensor = reserve(n_chunks, host.chunk_tensor), chunk_index = reserve(n_chunks, host.chunk_index);
  const size_t first_chunk = reserve(n + 1, host.first_chunk), block_begin = reserve(begin.size(), begin.data());
  const size_t filter_runs = reserve(host.n_filter_runs, host.filter_runs);
  const size_t arrivals = reserve<uint32_t>(1), partials = reserve<double>(kNSums * n_chunks);
  const size_t sums = reserve<double>(kNSums * (n + 1)), coeffs = reserve<double>(kNCoeffs * n);
  const size_t ww = reserve<double>(n_filters), aa = reserve<double>(n_filters);

  memory_ = at::empty({static_cast<int64_t>(image_.size())}, at::TensorOptions(at::kByte).device(device));
  send(0, image_.data(), static_cast<int64_t>(image_.size()));
  auto* base = memory_.mutable_data_ptr<uint8_t>();
  auto place = [&](auto*& field, size_t at) {
    field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(base + at);
  };
  Operand** row_fields[] = {&view_.w,      &view_.grad, &view_.first, &view_.saved, &view_.cache,  &view_.state1,
                            &view_.state2, &view_.step, &view_.out,   &view_.mask,  &view_.average};
  for (size_t row = 0; row < kNRows; ++row) place(*row_fields[row], rows + row * n * sizeof(Operand));
  place(view_.numel, numel);
  place(view_.flat, flat);
  place(view_.slices, slices);
  place(view_.first_dim, first_dim);
  place(view_.dims, dims);
  place(view_.group, group);
  place(view_.filters, filters);
  place(view_.chunk_tensor, chunk_tensor);
  place(view_.chunk_index, chunk_index);
  place(view_.first_chunk, first_chunk);
  place(view_.block_begin, block_begin);
  place(view_.filter_runs, filter_runs);
  place(view_.arrivals, arrivals);
  place(view_.partials, partials);
  place(view_.sums, sums);
  place(view_.coeffs, coeffs);
  place(filter_ww_, ww);
  place(filter_aa_, aa);
  view_.chunk_cost = nullptr;  // the host's affair
}

const PlanView& DeviceTables::upload(const PlanView& host) {
  const Operand* rows = host.w;  // the first of kNRows rows, side by side
  auto differs = [](const Operand& a, const Operand& b) { return a.address != b.address || a.dtype != b.dtype; };
  size_t begin = 0, end = sent_.size();
  while (begin < end && !differs(rows[begin], sent_[begin])) ++begin;
  while (begin < end && !differs(rows[end - 1], sent_[end - 1])) --end;
  if (begin < end) {
    if (functions->is_capturing(device_.index())) {
      std::copy(sent_.begin(), sent_.end(), host.w);  // so that what is under way can be undone
      TORCH_CHECK(
          false, "parameter ", begin % n_tensors_,
          ", its gradient or its state has moved since the last step, and a graph is being recorded, which would "
          "replay the old address: take some steps before recording, and use zero_grad(set_to_none=False)");
    }
    std::copy(rows + begin, rows + end, sent_.begin() + static_cast<std::ptrdiff_t>(begin));
    send(static_cast<int64_t>(begin * sizeof(Operand)), sent_.data() + begin,  // rows come first
         static_cast<int64_t>((end - begin) * sizeof(Operand)));
  }
  view_.fresh = host.fresh;
  view_.common_dtype = common_dtype(host);
  view_.filter_ww = host.filter_ww != nullptr ? filter_ww_ : nullptr;
  view_.filter_aa = host.filter_aa != nullptr ? filter_aa_ : nullptr;
  return view_;
}

at::Tensor DeviceTables::workspace(const double* begin, int64_t n) const {
  constexpr int64_t kSize = sizeof(double);
  const int64_t at = reinterpret_cast<const uint8_t*>(begin) - memory_.const_data_ptr<uint8_t>();
  return memory_.narrow(0, at, n * kSize).view(at::kDouble);
}

void DeviceTables::send(int64_t at, const void* from, int64_t n_bytes) {
  // torch's host allocator keeps the staging memory until the copy is done, and then hands it out again.
  at::Tensor staging = at::empty({n_bytes}, at::TensorOptions(at::kByte).pinned_memory(device_.is_cuda()));
  std::memcpy(staging.mutable_data_ptr<uint8_t>(), from, n_bytes);
  memory_.narrow(0, at, n_bytes).copy_(staging, /*non_blocking=*/true);
}

}  // namespace samkern
