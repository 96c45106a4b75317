// What a program that checks some kernels counts, and how it goes through the instruction sets.
#pragma once

#include <stdio.h>

#include <string>
#include <utility>
#include <vector>

#include "checking.h"
#include "rarefy.h"

namespace {

struct Tally {
  int64_t runs = 0, failures = 0;
  double worst = 0.0;
  void check(const Floats &found, const Truth &truth, double relative, bool intact) {
    const Doubles bounds = truth.bounds();
    bool good = intact;
    for (size_t i = 0; i < truth.exact.size(); ++i) {
      const double allowed = bounds[i] + relative * truth.magnitude[i], error = fabs(double(found[i]) - truth.exact[i]);
      if (!(error <= allowed)) good = false;
      if (allowed > 0) worst = std::max(worst, error / allowed);
    }
    ++runs;
    if (!good) ++failures;
  }
};

using Tallies = std::vector<std::pair<const char *, Tally>>;

// Calls run(), which gives a tally for each name, on every instruction set that is offered; says how they came out. Returns
// what main does: an argument is an instruction set that must be among them.
template <class Run>
int on_every_isa(int argc, char **argv, Run run) {
  const std::string offered = std::string(",") + rarefy_isas() + ",";
  printf("instruction sets: %s\n", rarefy_isas());
  for (int i = 1; i < argc; ++i) {
    if (offered.find(std::string(",") + argv[i] + ",") != std::string::npos) continue;
    printf("FAILED %s is not among them\n", argv[i]);
    return 1;
  }
  bool good = true;
  for (size_t at = 1; at + 1 < offered.size();) {
    const size_t end = offered.find(',', at);
    const std::string isa = offered.substr(at, end - at);
    at = end + 1;
    if (rarefy_set_isa(isa.c_str()) != RAREFY_OK) {
      printf("FAILED %s cannot be chosen\n", isa.c_str());
      return 1;
    }
    for (const auto &[name, tally] : run()) {
      printf("%-10s %-10s %7lld runs, worst error / allowed %.3f  %s\n", isa.c_str(), name, (long long)tally.runs,
             tally.worst, tally.failures == 0 ? "ok" : "FAILED");
      good = good && tally.failures == 0 && tally.runs > 0;
    }
  }
  printf(good ? "all passed\n" : "FAILED\n");
  return good ? 0 : 1;
}

}  // namespace
