// The table of contents: every operator of fusee, its schema, and a line on what it computes.
//
// This library holds schemas only. Kernels live in the engines (one shared library per instruction
// set, CUDA, and the emulated CUDA kernels), of which exactly one serves a device in a process.

#include "core/processor.h"
#include "core/torch.h"

STABLE_TORCH_LIBRARY(fusee, m) {
  // --- losses ---------------------------------------------------------------------------------
  // StableMax of (outer, n, inner) over n, or its logarithm; also the row sums S (float64).
  m.def("stablemax(Tensor input, bool log) -> (Tensor output, Tensor sum)");
  m.def("stablemax_backward(Tensor grad, Tensor input, Tensor sum, bool log) -> Tensor");
  // Cross entropy of StableMax of (outer, classes, inner); target holds class indices or
  // probabilities; reduction is 0 none, 1 mean, 2 sum. stats are (S, R / S) of each row,
  // info is (what a mean divides by, rows whose target is out of range).
  m.def(
      "stablemax_cross_entropy(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
      "int reduction, float label_smoothing, float z_loss) "
      "-> (Tensor loss, Tensor stats, Tensor info)");
  m.def(
      "stablemax_cross_entropy_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, "
      "Tensor stats, int ignore_index, float label_smoothing, float z_loss) -> Tensor");
  // The same of the logits input linear_weight^T + linear_bias, which are never materialised; input is
  // (rows, features). The gradients that are asked for are computed, for a loss gradient of one in the
  // forward operator; the others are empty tensors.
  m.def(
      "linear_stablemax_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias, Tensor? weight, int ignore_index, int reduction, float "
      "label_smoothing, "
      "bool input_grad, bool weight_grad, bool bias_grad) "
      "-> (Tensor loss, Tensor stats, Tensor info, Tensor grad_input, Tensor grad_linear_weight, "
      "Tensor grad_linear_bias)");
  m.def(
      "linear_stablemax_cross_entropy_backward(Tensor grad, Tensor input, Tensor linear_weight, "
      "Tensor target, Tensor? linear_bias, Tensor? weight, Tensor stats, int ignore_index, "
      "float label_smoothing, bool input_grad, bool weight_grad, bool bias_grad) "
      "-> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");
  // Removes from each gradient its component along the weights of its tensor or of its row, in place;
  // says of each of these whether it had no other component.
  m.def(
      "perp_grad_(Tensor[] weights, Tensor(a!)[] grads, bool per_row, bool rescale, "
      "bool skip_single, float threshold) -> Tensor");

  // --- reparam --------------------------------------------------------------------------------
  // Weights through a curve of the given kind (arctan, tanh, softsign, asinh, symlog, mu_law,
  // powerprop). a and b have one element each, or one for each channel in dimension 0 of the input.
  m.def("compand(Tensor input, Tensor a, Tensor b, int kind) -> Tensor");
  m.def(
      "compand_backward(Tensor grad, Tensor input, Tensor a, Tensor b, int kind) "
      "-> (Tensor grad_input, Tensor grad_a, Tensor grad_b)");
  // The same of many tensors at once; the gradients are those of all inputs, all a, all b.
  m.def("compand_foreach(Tensor[] inputs, Tensor[] a, Tensor[] b, int kind) -> Tensor[]");
  m.def(
      "compand_foreach_backward(Tensor[] grads, Tensor[] inputs, Tensor[] a, Tensor[] b, int kind) "
      "-> Tensor[]");

  // --- prox -----------------------------------------------------------------------------------
  // The group envelope of a batch of problems, input (batch, outer, groups, inner), with k groups each;
  // also the norms of the groups (batch, groups) and the knee of each problem.
  m.def(
      "group_envelope(Tensor input, Tensor? weights, Tensor k, bool debiased) "
      "-> (Tensor value, Tensor norms, Tensor knee)");
  m.def(
      "group_envelope_backward(Tensor grad, Tensor input, Tensor norms, Tensor knee, Tensor? "
      "weights, "
      "bool debiased) -> Tensor");
  // Its proximal operator; form is 0 the envelope, 1 debiased, 2 the projection onto k groups. roots are
  // three numbers of each problem: theta, or the least key that is kept; the last group that is kept of
  // those with that key; and whether it is a projection.
  m.def(
      "prox_group_envelope(Tensor input, Tensor? weights, Tensor? metric, Tensor k, Tensor lam, "
      "int form) -> (Tensor output, Tensor norms, Tensor roots)");
  m.def(
      "prox_group_envelope_backward(Tensor grad, Tensor input, Tensor norms, Tensor roots, "
      "Tensor? weights, Tensor? metric, Tensor k, Tensor lam, int form) "
      "-> (Tensor grad_input, Tensor grad_k, Tensor grad_lam)");
  // The operator in place on the tensors of many scopes, each with its k and lam; returns how many groups of
  // each are left. layout holds five numbers of each tensor: its scope, in order; the number of its first group in
  // the scope; and outer, groups and inner, as which its memory is read. Groups of equal number in a scope
  // are one. weights are those of all scopes, one after another, in float64.
  m.def(
      "prox_group_envelope_(Tensor(a!)[] tensors, SymInt[] layout, Tensor? weights, Tensor k, "
      "Tensor lam, int form) -> Tensor");
  // The same in a metric of elements: positive numbers for each tensor, of its dtype or float32.
  m.def(
      "prox_group_envelope_metric_(Tensor(a!)[] tensors, Tensor[] metric, SymInt[] layout, "
      "Tensor? weights, Tensor k, Tensor lam, int form) -> Tensor");

  // --- transport ------------------------------------------------------------------------------
  // Entropic optimal transport of a batch of problems, P = a b^T exp((f + g - C) / reg). metric is 0 for a
  // cost x (batch, n, m), without y; or of points x (batch, n, d) and y (batch, m, d) 1 sqeuclidean,
  // 2 euclidean, 3 cityblock, 4 dot. penalty (batch, 2) are the weights of the marginals' divergences,
  // infinite where they hold. stages (batch, 48, 7) are what each stage of annealing did: reg, Sinkhorn
  // iterations, Newton steps, CG iterations, kept entries, refused steps, error.
  m.def(
      "sinkhorn_newton(Tensor x, Tensor? y, int metric, Tensor a, Tensor b, Tensor reg, "
      "Tensor penalty, Tensor? g_init, float tol, int max_iter) "
      "-> (Tensor value, Tensor f, Tensor g, Tensor error, Tensor n_iter, Tensor stages)");
  // The solution of [[D1 (1 + reg / penalty1), P], [P^T, D2 (1 + reg / penalty2)]] (u; v) = (p; q), D1 and
  // D2 the sums of P: what implicit derivatives of the potentials need.
  m.def(
      "transport_solve(Tensor x, Tensor? y, int metric, Tensor a, Tensor b, Tensor reg, "
      "Tensor penalty, Tensor f, Tensor g, Tensor p, Tensor q) -> (Tensor u, Tensor v)");
  // P itself.
  m.def(
      "transport_plan(Tensor x, Tensor? y, int metric, Tensor a, Tensor b, Tensor reg, Tensor f, "
      "Tensor g) -> Tensor");
  // The gradient of the sum of P (left + right) C in x and y, for fixed P; and the sums of P / a over
  // right and of P / b over left.
  m.def(
      "transport_plan_gradient(Tensor x, Tensor? y, int metric, Tensor a, Tensor b, Tensor reg, "
      "Tensor f, Tensor g, Tensor left, Tensor right) "
      "-> (Tensor grad_x, Tensor grad_y, Tensor row_sums, Tensor column_sums)");

  // --- structured -----------------------------------------------------------------------------
  // Every block of the input (rows, k p) times its block of the weight (k, q, p): (rows, k q).
  m.def("block_diagonal_matmul(Tensor input, Tensor weight, Tensor? bias, bool tf32) -> Tensor");
  m.def(
      "block_diagonal_matmul_backward(Tensor grad, Tensor input, Tensor weight, int wanted, "
      "bool tf32) "
      "-> (Tensor grad_input, Tensor grad_weight)");
  // Two of these with strided permutations after each: input (rows, k p), w1 (k, q, p), w2 (l, s, r) with
  // k q = l r, and (rows, l s) of output. Element h of the middle goes to element h / l of block h % l, element i
  // of block j to i l + j of the output. Bit i of `wanted` asks for the i-th gradient; the others are empty.
  // tf32: CUDA may round the operands of float32 products to that.
  m.def("monarch_matmul(Tensor input, Tensor w1, Tensor w2, Tensor? bias, bool tf32) -> Tensor");
  m.def(
      "monarch_matmul_backward(Tensor grad, Tensor input, Tensor w1, Tensor w2, int wanted, "
      "bool tf32) "
      "-> (Tensor grad_input, Tensor grad_w1, Tensor grad_w2)");

  // --- bounds ---------------------------------------------------------------------------------
  // Boxes as center and radius (rows, in) through a layer with weight (out, in), and through ReLU where asked:
  // center W^T + bias and radius |W|^T. sound rounds outward. Bit i of `wanted` asks for the i-th gradient; the
  // results of the layer are given to its backward operator where it had a ReLU.
  m.def(
      "interval_linear(Tensor center, Tensor radius, Tensor weight, Tensor? bias, bool relu, "
      "bool sound, bool tf32) -> (Tensor out_center, Tensor out_radius)");
  m.def(
      "interval_linear_backward(Tensor grad_center, Tensor grad_radius, Tensor center, "
      "Tensor radius, Tensor weight, Tensor? out_center, Tensor? out_radius, int wanted, bool "
      "tf32) "
      "-> (Tensor grad_center, Tensor grad_radius, Tensor grad_weight, Tensor grad_bias)");
  // Boxes (outer, channels, inner) times the scale of their channel, plus its shift, and through ReLU.
  m.def(
      "interval_affine(Tensor center, Tensor radius, Tensor? scale, Tensor? shift, bool relu, "
      "bool sound) -> (Tensor out_center, Tensor out_radius)");
  m.def(
      "interval_affine_backward(Tensor grad_center, Tensor grad_radius, Tensor center, "
      "Tensor radius, Tensor? scale, Tensor? out_center, Tensor? out_radius, int wanted) "
      "-> (Tensor grad_center, Tensor grad_radius, Tensor grad_scale, Tensor grad_shift)");
  // Upper bounds of the differences of a layer's outputs to the output of the row's target (rows, classes).
  m.def(
      "interval_margins(Tensor center, Tensor radius, Tensor weight, Tensor? bias, Tensor target, "
      "bool sound) -> Tensor");
  m.def(
      "interval_margins_backward(Tensor grad, Tensor center, Tensor radius, Tensor weight, "
      "Tensor target, int wanted) "
      "-> (Tensor grad_center, Tensor grad_radius, Tensor grad_weight, Tensor grad_bias)");
}

// Called from Python through ctypes, before any engine is loaded.
extern "C" __attribute__((visibility("default"))) int fusee_processor_has(const char* feature) {
  return fusee::processor_has(feature);
}
