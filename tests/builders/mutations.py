"""What `tests/mutations.py` breaks in the library, a line at a time, and the test that must see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One thing broken: `old` in `file` becomes `new`, and `test` (of tests/) must see it."""

    what: str
    file: str
    old: str
    new: str
    test: str
    also: tuple[tuple[str, str, str], ...] = ()
    """Further (file, old, new), where two lines hold the same thing."""


MUTATIONS = (
    Mutation(
        "the sign of a leap",
        "plans/interpolants.py",
        "return 1, j - k",
        "return 1, k - j",
        "methods/test_algorithm_1.py",
    ),
    Mutation(
        "alpha applied to the straight path as well",
        "plans/nodes.py",
        "velocity = (self if discount is None else self.discount(discount)).velocity()\n        return Leap(self,",
        "x = self if discount is None else self.discount(discount)\n            velocity = x.velocity()\n"
        "            return Leap(x, velocity, to)\n        return Leap(self,",
        "methods/test_algorithm_1.py",
    ),
    Mutation(
        "a connector that rounds",
        "surgery/autograd_functions.py",
        "return value.clone()",
        "return x + (value - x)",
        "surgery/test_autograd_values.py",
    ),
    Mutation(
        "a recompute that forgets the parameters",
        "surgery/autograd_functions.py",
        "return None, None, *(next(gradients) if need else None for need in ctx.needs_input_grad[2:])",
        "got = [next(gradients) if need else None for need in ctx.needs_input_grad[2:]]\n"
        "        return None, None, got[0], *(None for _ in got[1:])",
        "surgery/test_run_ways.py",
    ),
    Mutation(
        "a missing detach in DRTune",
        "methods/drtune.py",
        "x.detach().velocity() if",
        "x.velocity() if",
        "methods/test_algorithm_1.py",
    ),
    Mutation(
        "a renoise drawn anew in the backward pass",
        "surgery/trajectory.py",
        "if (draw, to) not in self.noises:",
        "if True:",
        "surgery/test_run_ways.py",
    ),
    Mutation(
        "two draws that share a noise",
        "surgery/trajectory.py",
        "if (draw, to) not in self.noises:",
        "draw = 0\n        if (draw, to) not in self.noises:",
        "methods/test_algorithm_1.py",
    ),
    Mutation(
        "a detach under no_grad alone",
        "surgery/node_values.py",
        "nodes.Detach: lambda node, of, *_: of[node.x].detach(),",
        "nodes.Detach: lambda node, of, *_: of[node.x] * 1,",
        "surgery/test_forward_mode.py",
        (("surgery/execution.py", "value if node in self.live else value.detach()", "value"),),
    ),
    Mutation(
        "a connector that stops the gradient",
        "surgery/autograd_functions.py",
        "prediction, real.detach(), lambda gradient: gradient)",
        "prediction, real.detach(), lambda gradient: 0 * gradient)",
        "surgery/test_closed_form.py",
    ),
    Mutation(
        "a scale that scales the value",
        "surgery/autograd_functions.py",
        "_apply(_Edit, x, x.detach(), lambda gradient: gradient * factor)",
        "_apply(_Edit, x, x.detach() * factor, lambda gradient: gradient * factor)",
        "surgery/test_autograd_values.py",
    ),
    Mutation(
        "a scale whose tangent is not scaled",
        "surgery/autograd_functions.py",
        "return ctx.edit(tangent).to",
        "return tangent.to",
        "surgery/test_forward_mode.py",
    ),
    Mutation(
        "a recompute without the autocast of the forward pass",
        "surgery/autograd_functions.py",
        "with torch.enable_grad(), ctx.autocast, sdpa_kernel(ctx.kernels):",
        "with torch.enable_grad():",
        "surgery/test_recompute.py",
    ),
    Mutation(
        "a recompute that forgets its input's gradient",
        "surgery/autograd_functions.py",
        "x = x.detach().requires_grad_(ctx.needs_input_grad[2])",
        "x = x.detach().requires_grad_()\n        x = x.detach()",
        "surgery/test_run_ways.py",
    ),
    Mutation(
        "recompute under torch.func",
        "surgery/velocity_calls.py",
        'if memory != "retain" and not _inside_torch_func():',
        'if memory != "retain":',
        "surgery/test_forward_mode.py",
    ),
    Mutation(
        "a staged sweep in the order of the forward pass",
        "surgery/api.py",
        "in reversed(stages):",
        "in stages:",
        "surgery/test_run_ways.py",
    ),
    Mutation(
        "a staged sweep that drops the input's gradient",
        "surgery/api.py",
        "if start.grad is not None:",
        "if False:",
        "surgery/test_run_ways.py",
    ),
    Mutation(
        "a split call that forgets its input's gradient",
        "surgery/autograd_functions.py",
        "return None, x.grad, None, None, None, None",
        "return None, None, None, None, None, None",
        "surgery/test_run_ways.py",
    ),
    Mutation(
        "a split call that autograd.grad may use",
        "surgery/autograd_functions.py",
        "if torch.is_grad_enabled() or not torch._C._will_engine_execute_node(ctx.token):",
        "if torch.is_grad_enabled():",
        "surgery/test_split.py",
    ),
    Mutation(
        "a faithful value computed again",
        "surgery/node_values.py",
        "return autograd_functions.connect(prediction, trajectory[node.to]) if faithful else prediction",
        "return prediction",
        "surgery/test_run_values.py",
    ),
    Mutation(
        "every leap(t - 1) taken for the sampler's step",
        "plans/graph.py",
        "leap.to == t - 1 and is_step(t)",
        "leap.to == t - 1",
        "surgery/test_run_values.py",
    ),
    Mutation(
        "calls shared whatever their input",
        "plans/graph.py",
        "return node.field is None and node.x in known",
        "return node.field is None",
        "surgery/test_run_ways.py",
    ),
    Mutation(
        "a named field's call taken for recorded",
        "plans/graph.py",
        "return node.field is None and node.x in known",
        "return node.x in known",
        "surgery/test_closed_form.py",
    ),
    Mutation(
        "a straight path without its factor A",
        "plans/derivatives.py",
        "interpolant.leap(times(node.x.t), times(node.to), times.xp),",
        "(1, interpolant.leap(times(node.x.t), times(node.to), times.xp)[1]),",
        "plans/test_closed_form_paper.py",
    ),
    Mutation(
        "a discount left out of the closed form",
        "plans/derivatives.py",
        "Discount: lambda node, times, _: [times.factor(node.a)],",
        "Discount: lambda *_: [1],",
        "plans/test_closed_form_paper.py",
    ),
    Mutation(
        "a renoise without alpha in the closed form",
        "plans/derivatives.py",
        "[interpolant.alpha(times(node.to), times.xp)],",
        "[1],",
        "surgery/test_closed_form.py",
    ),
    Mutation(
        "Lagrange weights of the wrong sign",
        "plans/interpolants.py",
        "scale = scale * (supports[i] - support)",
        "scale = scale * (support - supports[i])",
        "plans/test_quadrature.py",
    ),
    Mutation(
        "supports that are not sorted",
        "surgery/node_values.py",
        "order = sorted(node.velocities, key=lambda v: -int(v.t))",
        "order = list(node.velocities)",
        "plans/test_quadrature.py",
    ),
    Mutation(
        "a recover without beta",
        "surgery/node_values.py",
        "of[node.x] - beta * eps",
        "of[node.x]",
        "surgery/test_run_values.py",
    ),
    Mutation(
        "pairs of times that may be equal",
        "methods/leapalign.py",
        "return sorted(distinct(allowed, self.leaps, generator)",
        "return sorted([max(allowed) - uniform(2, generator) for _ in range(self.leaps)]",
        "methods/test_algorithm_1.py",
    ),
    Mutation(
        "DRTune draws that train nothing",
        "methods/drtune.py",
        "if max(times) >= stop:",
        "if True:",
        "methods/test_algorithm_1.py",
    ),
    Mutation(
        "nodes that are not shared",
        "plans/expression.py",
        "return _HashConsed._cache.setdefault(key, node)",
        "return node",
        "plans/test_nodes.py",
    ),
    Mutation(
        "a rule that is not checked",
        "plans/rules.py",
        "if start is not None and start > 0:",
        "if False:",
        "plans/test_legality.py",
    ),
    Mutation(
        "a noise() without gradient",
        "surgery/node_values.py",
        "return trajectory.start\n",
        "return trajectory.start.detach()\n",
        "surgery/test_run_ways.py",
    ),
    Mutation(
        "a call of split made again on other weights",
        "surgery/autograd_functions.py",
        "[leaf._version for leaf in ctx.leaves] != ctx.versions",
        "False",
        "surgery/test_split.py",
    ),
    Mutation(
        "split under DistributedDataParallel",
        "surgery/velocity_calls.py",
        'memory == "split" and any(isinstance',
        "False and any(isinstance",
        "surgery/test_distributed.py",
    ),
)
