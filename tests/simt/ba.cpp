// The launchers of ba for Python. Compiled with the checker's hooks; csrc/ba/ba.cu is what it stands for.
#include "../../kernels/ba/retract.cuh"
#include "../../kernels/ba/system.cuh"
#include "kernels.h"

namespace effk::simt {
namespace {

template <class T = void>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

effk::Indices indices(const Indices& v) { return {pointer<const void>(std::get<0>(v)), std::get<1>(v)}; }

ba::Call call_of(ba::Op op, const BaProblem& problem) {
  const auto& [sizes, numbers, addresses, camera, point] = problem;
  ba::Call call{};
  call.op = op;
  ba::Problem& p = call.p.a;
  p.model = static_cast<ba::Model>(sizes[0]);
  p.loss = static_cast<ba::Loss>(sizes[1]);
  p.is_double = sizes[2];
  call.quaternion = sizes[3];
  p.cameras = sizes[4], p.points = sizes[5], p.observations = sizes[6];
  call.num_sms = static_cast<int>(sizes[7]);
  call.most_blocks = sizes[8];
  p.loss_scale = numbers[0];
  p.depth_weight = numbers[1];
  p.radius = numbers[2];
  call.cameras = pointer<const void>(addresses[0]);
  p.point = pointer<const void>(addresses[1]);
  p.observed = pointer<const void>(addresses[2]);
  p.depth = pointer<const void>(addresses[3]);
  p.fixed = pointer<const uint8_t>(addresses[4]);
  call.step = pointer<const double>(addresses[5]);
  call.keys = pointer<const int32_t>(addresses[6]);
  call.order = pointer<const int64_t>(addresses[7]);
  call.p.camera = indices(camera);
  call.p.point = indices(point);
  call.is_diagonal = true;
  return call;
}

// Runs f with scratch in place.
template <class F>
gpu::Error with_scratch(ba::Call call, const F& f) {
  const Memory scratch("scratch", nullptr, ba::place(call, nullptr), Memory::Kind::output);
  ba::place(call, scratch.data());
  return f(call);
}

}  // namespace

gpu::Error ba_keys(BaProblem p, Address keys) {
  return ba::launch_keys(call_of(ba::Op::build, p), pointer<int32_t>(keys), 0);
}

gpu::Error ba_residual(BaProblem p, Address residual, Address valid, Address jac_camera, Address jac_point) {
  return with_scratch(call_of(ba::Op::residual, p), [&](const ba::Call& call) {
    return ba::launch_residual(call, pointer(residual), pointer<uint8_t>(valid), pointer(jac_camera),
                               pointer(jac_point), 0);
  });
}

gpu::Error ba_cost(BaProblem p, Address cost) {
  return with_scratch(call_of(ba::Op::cost, p),
                      [&](const ba::Call& call) { return ba::launch_cost(call, pointer<double>(cost), 0); });
}

gpu::Error ba_build(BaProblem p, std::vector<Address> to) {
  const auto at = [&](int i) { return pointer<double>(to[i]); };
  return with_scratch(call_of(ba::Op::build, p), [&](const ba::Call& call) {
    return ba::launch_build(call, {at(0), at(1), at(2), at(3), at(4)}, 0);
  });
}

gpu::Error ba_schur(BaProblem p, std::tuple<bool, Indices, int64_t> pairs, std::vector<Address> to) {
  const auto at = [&](int i) { return pointer<double>(to[i]); };
  ba::Call call = call_of(ba::Op::schur, p);
  call.is_diagonal = !std::get<0>(pairs);
  call.pairs = indices(std::get<1>(pairs));
  call.num_pairs = std::get<2>(pairs);
  return with_scratch(call, [&](const ba::Call& placed) {
    return ba::launch_schur(placed, {at(0), at(1), at(2), at(3), at(4), at(5)}, 0);
  });
}

gpu::Error ba_schur_mv(BaProblem p, Address y) {
  return with_scratch(call_of(ba::Op::schur_mv, p),
                      [&](const ba::Call& call) { return ba::launch_schur_mv(call, pointer<double>(y), 0); });
}

gpu::Error ba_backsubstitute(BaProblem p, std::vector<Address> to) {
  return with_scratch(call_of(ba::Op::backsubstitute, p), [&](const ba::Call& call) {
    return ba::launch_backsubstitute(call, {pointer<double>(to[0]), pointer<double>(to[1])}, 0);
  });
}

gpu::Error ba_retract(std::vector<int64_t> sizes, std::vector<Address> addresses) {
  const auto at = [&](int i) { return pointer(addresses[i]); };
  return ba::launch_retract({static_cast<ba::Model>(sizes[0]), sizes[2] != 0, sizes[1] != 0, sizes[3], sizes[4] * 3,
                             at(0), at(1), static_cast<double*>(at(2)), static_cast<double*>(at(3)), at(4), at(5)},
                            sizes[5], 0);
}

}  // namespace effk::simt
