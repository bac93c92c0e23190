"""Mutants of the core that behave as the package does, each with the reason why no test can see it."""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "surgery/autograd_functions.py",
        "@staticmethod",
        "",
    ): "torch calls a Function's methods on its class, where a plain function is alike.",
    ("plans/rules.py", "if len(set(times)) < len(times):", "if len(set(times)) != len(times):"): (
        "a set never has more members than the list that it is made of."
    ),
    (
        "plans/interpolants.py",
        "(powers[p - 1] if p > 0 else 0) - (root * powers[p] if p < len(powers) else 0)",
        "(powers[p - 1] if p > 0 else 0) - (root * powers[p] if p is not len(powers) else 0)",
    ): "p is never above the number of powers, and Python keeps one object of each small int.",
    (
        "plans/closed_form.py",
        "if isinstance(a, sympy.Add) and sympy.sympify(b).is_number:",
        "if isinstance(a, sympy.Add) or sympy.sympify(b).is_number:",
    ): "the factors are swapped in more cases, and their product is the same.",
    (
        "plans/closed_form.py",
        "found, count = found | more if found else more, count + self.below[parent]",
        "found, count = found ^ more if found else more, count + self.below[parent]",
    ): "the two sets have nothing in common there.",
    (
        "plans/closed_form.py",
        "if found & more:  # a call on two ways: they are merged, and may cancel",
        "if not found & more:  # a call on two ways: they are merged, and may cancel",
    ): "every node is then counted as one whose ways merge, which gives the same count in more time.",
    (
        "plans/derivatives.py",
        "ws = dict(zip(order, found, strict=True))",
        "ws = dict(zip(order, found, strict=False))",
    ): ("there are as many weights as supports."),
    (
        "surgery/autograd_functions.py",
        "inputs = [v for v, need in zip((x, *ctx.leaves), ctx.needs_input_grad[2:], strict=True) if need]",
        "inputs = [v for v, need in zip((x, *ctx.leaves), ctx.needs_input_grad[2:], strict=False) if need]",
    ): "torch gives one flag for each input.",
    (
        "surgery/velocity_calls.py",
        "dual = torch.autograd.forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]",
        "dual = torch.autograd.forward_ad._current_level == 0  # pyright: ignore[reportPrivateUsage]",
    ): "torch has one level of forward-mode AD, number 0.",
    (
        "plans/closed_form.py",
        "if found & more:  # a call on two ways: they are merged, and may cancel",
        "if found | more:  # a call on two ways: they are merged, and may cancel",
    ): "every node is then counted as one whose ways merge, which gives the same count in more time.",
    (
        "plans/closed_form.py",
        "merged = {call: found[call][0] if len(found[call]) == 1 else simplify(sum(found[call])) for call in calls}",
        "merged = {call: found[call][ -1] if len(found[call]) == 1 else simplify(sum(found[call])) for call in calls}",
    ): "the first and the last of one.",
    (
        "plans/rules.py",
        'takes_latent = i == 0 and "x" in node.inputs',
        'takes_latent = i <= 0 and "x" in node.inputs',
    ): "i counts from 0.",
    (
        "plans/rules.py",
        'if node.rule == "adams-bashforth" and min(known) < start:',
        'if node.rule <= "adams-bashforth" and min(known) < start:',
    ): "no other rule's name stands before it.",
    (
        "plans/rules.py",
        "if start is None or len(known) < len(times) or not times:",
        "if start is None or len(known) != len(times) or not times:",
    ): "the known ones are among all.",
    (
        "plans/interpolants.py",
        "(powers[p - 1] if p > 0 else 0) - (root * powers[p] if p < len(powers) else 0)",
        "(powers[p - 1] if p > 0 else 0) - (root * powers[p] if p != len(powers) else 0)",
    ): "p is never above the number of powers.",
    (
        "plans/interpolants.py",
        "if m != i:",
        "if m is not i:",
    ): "both count few supports, and small ints are one object.",
    ("plans/rules.py", "if t == START:", "if t is START:"): "Python keeps one object of each one-letter text.",
    (
        "plans/rules.py",
        "if node.time != START and steps is not None and node.time != steps and isinstance(node.time, int):",
        "if node.time is not START and steps is not None and node.time != steps and isinstance(node.time, int):",
    ): "Python keeps one object of each one-letter text.",
    (
        "plans/legality.py",
        'if found and found[-1].rule == "kinds":',
        'if found and found[-1].rule is "kinds":',
    ): "both are the same word of the source.",
    (
        "surgery/execution.py",
        "recorded, differentiable = faithful(plan.outputs, lambda _: False), needs_gradient(plan.outputs)",
        "recorded, differentiable = faithful(plan.outputs, lambda _: True), needs_gradient(plan.outputs)",
    ): "it asks for calls at T, before which no leap can stand.",
}
"""(file, line, changed line): why no test can see the change."""
