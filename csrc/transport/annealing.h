// What to do next: how one problem goes from a weak regularisation to its own.
//
// The regularisation is halved from stage to stage. A stage begins with steps of Sinkhorn's iteration, goes on with
// them as long as they do well, and then takes Newton's steps, damped and searched along, until the error is small
// enough for the next stage. The machine sees numbers alone, so that any engine can drive it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

constexpr int kStages = 48;
constexpr int kStageNumbers = 7;
// The relative error with which a stage but the last is left.
constexpr double kGoal = 1e-2;

enum class Action : int32_t { kSinkhorn, kNewton, kTrial, kDone };

struct Annealing {
  // Given: the last regularisation, the error to be reached for a unit of mass, the mass, and how many
  // iterations may be taken.
  double last_reg, tolerance, mass;
  int64_t max_iterations;

  double first_reg = 0, reg = 0, damping = 0, step = 1, fineness = 0.1;
  double objective = 0, error = 0;
  // The share of the plan's entries in the last equations, or what it is likely to be.
  double density = 1;
  int64_t iterations = 0;
  int32_t stage = 0, sinkhorn_left = 0, in_stage = 0;
  // The iteration in which the error was last at most half of `best`.
  double best = 0;
  int32_t best_at = 0;
  bool trying = false, stopping = false;
  Action action = Action::kSinkhorn;
  double reports[kStages][kStageNumbers] = {};

  // Where potentials are given, which may be those of a similar problem, the last regularisation is tried first.
  FUSEE_HOST_DEVICE Annealing(double reg_, double range, double tolerance_, double mass_,
                              int64_t max_iterations_, bool given)
      : last_reg(reg_),
        tolerance(tolerance_ * mass_),
        mass(mass_),
        max_iterations(max_iterations_) {
    constexpr double kRangeOfFirst = 40;
    first_reg = last_reg;
    for (int k = 1; k < kStages && first_reg < range / kRangeOfFirst; ++k) first_reg *= 2;
    trying = given;
    reg = trying ? last_reg : first_reg;
    begin_stage(5);
  }

  FUSEE_HOST_DEVICE bool last() const { return !(reg > last_reg); }

  // What may be left out of the columns for a step that is worth taking.
  FUSEE_HOST_DEVICE double dropped() const {
    return std::fmax(std::fmin(fineness * error / mass, 0.05), 1e-17);
  }
  // Without any, parts of the plan that hardly exchange mass would go far for little.
  FUSEE_HOST_DEVICE double ridge() const { return std::fmax(damping, 1e-3 * error / mass); }
  // The relative residual to which its equations are solved.
  FUSEE_HOST_DEVICE double residual() const {
    return std::fmax(std::fmin(1e-2, 0.1 * error / mass), 1e-12);
  }

  // After the first evaluation, and after one that follows a step of Sinkhorn's.
  FUSEE_HOST_DEVICE void begin(double objective_, double error_) {
    if (trying && !(error_ <= kGoal * mass)) {
      reg = first_reg;
      begin_stage(5);
    } else {
      take(objective_, error_);
      if (stopping) action = Action::kDone;
    }
    trying = false;
  }

  FUSEE_HOST_DEVICE void after_sinkhorn(double objective_, double error_) {
    const double before = error;
    take(objective_, error_);
    count(1);
    if (ended()) return;
    --sinkhorn_left;
    const bool unknown = !(error < 1e300);
    action = sinkhorn_left > 0 || unknown || goes_well(error / before) ? Action::kSinkhorn
                                                                       : Action::kNewton;
  }

  // Equations were solved in `solves` iterations with `entries` of the plan's `all`.
  FUSEE_HOST_DEVICE void after_solve(int64_t solves, int64_t entries, int64_t all) {
    density = static_cast<double>(entries) / static_cast<double>(all);
    report(3, static_cast<double>(solves));
    reports[stage][4] = static_cast<double>(entries);
    step = 1;
    action = Action::kTrial;
  }

  // Whether a trial is taken, at which the objective and the error are these; slope is that of the objective at
  // its beginning. If not, the next trial is shorter, or steps of Sinkhorn's come first.
  FUSEE_HOST_DEVICE bool after_trial(double objective_, double error_, double slope) {
    const double slack = 4e-16 * std::fabs(objective);
    const bool grows = objective_ >= objective + 1e-4 * step * slope - slack && slope > 0;
    const bool near = error < 1e-7 * mass && error_ < error;
    if (grows || near) {
      const bool poor = error_ > 0.3 * error;
      take(objective_, error_);
      count(2);
      if (step < 1) {
        damping = std::fmax(4 * damping, 1e-3);
        sinkhorn_left = 1;
      } else {
        damping = damping > 1e-4 ? damping / 4 : 0;
      }
      if (poor) fineness = std::fmax(fineness / 4, 1e-4);
      if (ended()) return true;
      action = sinkhorn_left > 0 ? Action::kSinkhorn : Action::kNewton;
      return true;
    }
    report(5, 1);
    step *= 0.25;
    if (step > 2e-3) return false;
    damping = std::fmin(std::fmax(16 * damping, 1e-2), 1e6);
    fineness = std::fmax(fineness / 4, 1e-4);
    sinkhorn_left = 2;
    count(2);
    if (!ended()) action = Action::kSinkhorn;
    return false;
  }

 private:
  FUSEE_HOST_DEVICE double goal() const { return last() ? tolerance : kGoal * mass; }

  // Whether steps of Sinkhorn's reach the goal sooner than Newton's. Those cost as many of them as the plan
  // has entries that count, and lead further into the next stage.
  FUSEE_HOST_DEVICE bool goes_well(double ratio) const {
    const double most = last() || stage == 0 ? 12 + 108 * density : 3;
    return in_stage < 200 && ratio < 1 && std::log(goal() / error) > most * std::log(ratio);
  }

  FUSEE_HOST_DEVICE void report(int what, double more) { reports[stage][what] += more; }

  FUSEE_HOST_DEVICE void count(int what) {
    report(what, 1);
    ++iterations;
    ++in_stage;
  }

  FUSEE_HOST_DEVICE void begin_stage(int32_t sinkhorn) {
    reports[stage][0] = reg;
    sinkhorn_left = sinkhorn;
    in_stage = 0;
    best = 1e308;
    best_at = 0;
    fineness = 0.1;
    action = Action::kSinkhorn;
  }

  FUSEE_HOST_DEVICE void take(double objective_, double error_) {
    objective = objective_;
    error = error_;
    reports[stage][6] = error_;
    if (error_ < 0.5 * best) {
      best = error_;
      best_at = in_stage;
    }
  }

  // Goes to the next stage if this one has done its work, or to the end.
  FUSEE_HOST_DEVICE bool ended() {
    constexpr int32_t kPatience = 100, kPatienceOfStage = 60;
    const bool slow = in_stage - best_at > (last() ? kPatience : kPatienceOfStage);
    const bool exhausted = iterations >= max_iterations;
    if (!(error <= goal() || slow || exhausted)) return false;
    if (last()) {
      action = Action::kDone;
      return true;
    }
    // What is returned is always a point of the last regularisation.
    stopping = exhausted;
    reg = stopping ? last_reg : std::fmax(0.5 * reg, last_reg);
    ++stage;
    density *= 0.6;
    begin_stage(2);
    return true;
  }
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
