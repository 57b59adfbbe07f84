// A program without Python: loads effk's library and calls an op, then runs a model that AOTInductor compiled.
//
//   use LIBRARY MODEL.pt2
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>

int main(int count, char** arguments) {
  if (count != 3) return 2;
  if (!dlopen(arguments[1], RTLD_NOW)) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  const auto op = [](const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); };

  const torch::Tensor w = torch::relu(torch::arange(-24, 24).to(torch::kFloat).reshape({6, 8}));
  c10::Stack stack{w, c10::IValue()};
  op("effk::lscd_pack").callBoxed(stack);
  stack.insert(stack.begin(), torch::ones({2, 8}));
  stack.insert(stack.end(), {6, 8, c10::IValue(), c10::IValue(), "none"});
  op("effk::lscd_linear").callBoxed(stack);
  const torch::Tensor y = stack.at(0).toTensor();
  if (!torch::equal(y[1], w.sum(1))) {
    std::cerr << "lscd_linear gave\n" << y << "\n";
    return 1;
  }

  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  const torch::Tensor x = torch::ones({3, 8});
  std::cout << model.run({x})[0].sum().item<float>() << "\n";
}
