// The checker as a Python module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace py = pybind11;
using namespace effk::simt;

namespace {

struct Report {
  std::string text;
};

// A launcher that raises.
template <auto kLaunch, class... Args>
void call(Args... args) {
  if (const char* error = kLaunch(args...)) throw Report{error};
}

template <auto kLaunch, class... Args>
void def(py::module_& m, const char* name, const char* (*)(Args...)) {
  m.def(name, &call<kLaunch, Args...>);
}

}  // namespace

PYBIND11_MODULE(effk_simt, m) {
  static py::exception<Report> report(m, "Report", PyExc_AssertionError);
  py::register_exception_translator([](std::exception_ptr e) {
    try {
      if (e) std::rethrow_exception(e);
    } catch (const Report& r) {
      py::set_error(report, r.text.c_str());
    }
  });

  m.def("seed", &seed);
  m.def("set_seed", &set_seed);
  m.def("allow_uninitialised", &allow_uninitialised);
  py::enum_<Memory::Kind>(m, "Kind")
      .value("input", Memory::Kind::input)
      .value("output", Memory::Kind::output)
      .value("inout", Memory::Kind::inout);
  py::class_<Memory>(m, "Memory")
      .def(py::init([](const std::string& name, Address from, size_t bytes, Memory::Kind kind) {
        return new Memory(name, reinterpret_cast<const void*>(from), bytes, kind);
      }))
      .def("copy_to", [](const Memory& memory, Address to) { memory.copy_to(reinterpret_cast<void*>(to)); })
      .def_property_readonly("address", [](const Memory& memory) { return reinterpret_cast<Address>(memory.data()); });

#define EFFK_DEF(name) def<&name>(m, #name, &name)
  EFFK_DEF(lscd_count);
  EFFK_DEF(lscd_fill);
  EFFK_DEF(lscd_unpack);
  EFFK_DEF(lscd_linear);
  EFFK_DEF(lscd_finish);
  EFFK_DEF(w4a8_quantize);
  EFFK_DEF(w4a8_order);
  EFFK_DEF(w4a8_pack);
  EFFK_DEF(w4a8_unpack);
  EFFK_DEF(w4a8_linear);
  EFFK_DEF(w4a8_accumulate);
  EFFK_DEF(w4a8_salience);
  EFFK_DEF(lora_merge);
  EFFK_DEF(lora_apply);
  EFFK_DEF(moe_route);
  EFFK_DEF(moe_sort);
  EFFK_DEF(moe_grouped_gemm);
  EFFK_DEF(moe_grouped_wgrad);
  EFFK_DEF(moe_combine);
  EFFK_DEF(moe_mlp);
  EFFK_DEF(vq_encode);
  EFFK_DEF(vq_lut);
  EFFK_DEF(vq_score);
  EFFK_DEF(vq_topk);
  EFFK_DEF(vq_attend);
  EFFK_DEF(vq_wrope);
  EFFK_DEF(ba_keys);
  EFFK_DEF(ba_residual);
  EFFK_DEF(ba_cost);
  EFFK_DEF(ba_build);
  EFFK_DEF(ba_schur);
  EFFK_DEF(ba_schur_mv);
  EFFK_DEF(ba_backsubstitute);
  EFFK_DEF(ba_retract);
#undef EFFK_DEF
  m.def("wrappers", &call<&wrappers, const std::string&, Address, Address, Address>);
  m.def("planted", &call<&planted, const std::string&, Address, Address>);
  m.def("planted_names", &planted_names);
}
