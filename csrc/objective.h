// What an attack wants of a target. The ops take it by name, so that a further objective changes no
// schema.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>

namespace dagcore {

enum class Objective : int {
  leave,  // the argmax is to be any class but the label
  reach,  // the argmax is to be the adversarial label
};

struct NamedObjective {
  const char* name;
  Objective objective;
};
constexpr NamedObjective kObjectives[] = {{"leave", Objective::leave}, {"reach", Objective::reach}};

inline Objective objective_named(const std::string& name) {
  std::string allowed;
  for (const NamedObjective& known : kObjectives) {
    if (name == known.name) return known.objective;
    allowed += (allowed.empty() ? "" : ", ") + std::string(known.name);
  }
  STD_TORCH_CHECK(false, "objective must be one of ", allowed, ", got ", name);
}

}  // namespace dagcore
