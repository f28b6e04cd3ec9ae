"""A plan detects every change between two steps, so the next step is correct."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import onepass

from .cases import assert_same, make_params, same_bits, set_grads

CPU = torch.device("cpu")
BACKENDS = [b.name for b in onepass.backends.BACKENDS.values() if not b.unavailable(CPU)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def build(backend, states="fp32", cls=onepass.AdamW, **options):
    params = make_params([(7,), (3, 5), (300,)], torch.float32, 1)
    return params, cls(params, lr=0.1, states=states, backend=backend, **options)


def both(backend, change, cls=onepass.AdamW, **options):
    """Runs two steps, a change and two more steps, with the plan reused and with a new plan at each
    step. Returns the optimizer that reused the plan after comparing both."""
    results = []
    for fresh in (False, True):
        params, optimizer = build(backend, cls=cls, **options)
        for step in range(4):
            set_grads(params, torch.float32, step)
            if step == 2:
                change(params, optimizer)
            if fresh:
                optimizer._plan = None
            optimizer.step()
        results.append(optimizer)
    assert_same(*results)
    return results[0]


def test_plan_is_reused_without_changes(backend, monkeypatch):
    made = []
    original = onepass.engine.plan.Plan.__init__
    monkeypatch.setattr(
        onepass.engine.plan.Plan,
        "__init__",
        lambda self, *a, **k: (made.append(1), original(self, *a, **k))[1],
    )
    params, optimizer = build(backend, cls=onepass.SGD, momentum=0.9, dampening=0.5)
    for step in range(5):
        optimizer.zero_grad()
        set_grads(params, torch.float32, step)
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.param_groups[0]["weight_decay"] += 0.1
        optimizer.step()
    assert len(made) == 1


def replace_state(params, optimizer):
    optimizer.state[params[1]]["exp_avg"] = torch.full((3, 5), 2.0)


def swap_state_storage(params, optimizer):
    optimizer.state[params[1]]["exp_avg"].data = torch.full((3, 5), 2.0)


def state_of_another_format(params, optimizer):
    state = optimizer.state[params[1]]
    state["exp_avg"] = state["exp_avg"].to(torch.bfloat16)


def update_state(params, optimizer):
    optimizer.state[params[1]].update(exp_avg=torch.full((3, 5), 2.0))


def merge_state(params, optimizer):
    state = optimizer.state[params[1]]
    state |= {"exp_avg": torch.full((3, 5), 2.0)}


def pop_state(params, optimizer):
    optimizer.state[params[1]].pop("exp_avg")


def delete_state(params, optimizer):
    del optimizer.state[params[1]]["exp_avg_sq"]


def clear_state(params, optimizer):
    optimizer.state[params[1]].clear()


def plain_dictionary(params, optimizer):
    optimizer.state[params[1]] = {"step": torch.tensor(1.0), **optimizer.state[params[0]]}
    optimizer.state[params[1]].pop("exp_avg")
    optimizer.state[params[1]].pop("exp_avg_sq")


def replace_state_dict_of_one(params, optimizer):
    state = optimizer.state[params[1]]
    optimizer.state[params[1]] = {k: v.clone() for k, v in state.items()}


def forget_one(params, optimizer):
    del optimizer.state[params[2]]


def forget_all(params, optimizer):
    optimizer.state.clear()


def another_state_mapping(params, optimizer):
    from collections import defaultdict

    optimizer.state = defaultdict(dict)


def set_the_counter(params, optimizer):
    optimizer.state[params[0]]["step"].fill_(50)


def move_weight(params, optimizer):
    params[2].data = params[2].detach().clone() + 1.0


def permute_weight(params, optimizer):
    params[1].data = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).t()


def missing_grad(params, optimizer):
    params[0].grad = None


def expanded_grad(params, optimizer):
    params[1].grad = torch.ones(()).expand(3, 5)


def amsgrad(params, optimizer):
    optimizer.param_groups[0]["amsgrad"] = True


def other_format(params, optimizer):
    optimizer.param_groups[0]["states"] = "bf16"
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].to(torch.bfloat16)


def new_group(params, optimizer):
    extra = torch.nn.Parameter(torch.ones(4))
    extra.grad = torch.ones(4)
    optimizer.add_param_group({"params": [extra], "lr": 1.0})


def fewer_parameters(params, optimizer):
    optimizer.param_groups[0]["params"].pop()


def reload(params, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


CHANGES = [
    update_state,
    merge_state,
    pop_state,
    delete_state,
    clear_state,
    plain_dictionary,
    replace_state,
    swap_state_storage,
    state_of_another_format,
    replace_state_dict_of_one,
    forget_one,
    forget_all,
    another_state_mapping,
    set_the_counter,
    move_weight,
    permute_weight,
    missing_grad,
    expanded_grad,
    amsgrad,
    other_format,
    new_group,
    fewer_parameters,
    reload,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changes_between_steps(backend, change):
    both(backend, change)


def test_each_change_affects_the_result(backend):
    """Each change affects the result; otherwise test_changes_between_steps would prove nothing."""
    unchanged = both(backend, lambda *_: None).param_groups[0]["params"]
    for change in (replace_state, swap_state_storage, move_weight, set_the_counter):
        changed = both(backend, change).param_groups[0]["params"]
        assert not all(torch.equal(p, q) for p, q in zip(changed, unchanged, strict=True))


def test_a_parameter_that_gets_its_first_gradient_later(backend):
    params, optimizer = build(backend, cls=onepass.SGD, momentum=0.9, dampening=0.5)
    late = params[1]
    for step in range(4):
        set_grads(params, torch.float32, step)
        if step < 2:
            late.grad = None
        if step == 2:
            grad = late.grad.clone()
        optimizer.step()
        if step < 2:
            assert late not in optimizer.state
        if step == 2:  # the first gradient initializes the buffer, without dampening
            assert torch.equal(optimizer.state[late]["momentum_buffer"], grad)
    assert optimizer.state[late]["step"] == 2
    assert optimizer.state[params[0]]["step"] == 4


def test_parameters_with_the_same_history_share_a_counter(backend):
    params, optimizer = build(backend)
    set_grads(params, torch.float32, 0)
    optimizer.step()
    steps = [optimizer.state[p]["step"] for p in params]
    assert steps[0] is steps[1] is steps[2]


def test_fallback_to_the_reference_warns_and_works(monkeypatch):
    cpu = onepass.backends.BACKENDS["cpu"]
    monkeypatch.setattr(type(cpu), "unavailable", lambda self, device: "not built")
    params, optimizer = build(None)
    set_grads(params, torch.float32, 0)
    with pytest.warns(UserWarning, match="slow reference backend .*cpu: not built"):
        optimizer.step()
    expected, reference = build("reference")
    set_grads(expected, torch.float32, 0)
    reference.step()
    assert_same(optimizer, reference)
    asked = onepass.AdamW(params, backend="cpu")
    with pytest.raises(
        RuntimeError, match="backend 'cpu' cannot serve parameters on cpu: not built"
    ):
        asked.step()


def test_a_state_of_another_shape_is_refused(backend):
    params, optimizer = build(backend)
    set_grads(params, torch.float32, 0)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 1 of shape \(3, 5\) is \(4, 5\)"):
        optimizer.step()


def test_no_gradients_no_parameters(backend):
    _, optimizer = build(backend)
    optimizer.step()
    assert not optimizer.state
    empty = torch.nn.Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    onepass.AdamW([empty], backend=backend).step()


def test_random_bits_are_keyed_by_the_parameters_position(backend):
    """The random bits of a parameter do not depend on whether other parameters have gradients."""
    results = []
    for skip in (False, True):
        params, optimizer = build(backend, states="bf16")
        set_grads(params, torch.float32, 0)
        if skip:
            params[0].grad = None
        optimizer.step()
        results.append(optimizer.state[params[2]]["exp_avg"])
    assert same_bits(*results)
    params, optimizer = build(backend, states="bf16", seed=1)
    set_grads(params, torch.float32, 0)
    optimizer.step()
    assert not same_bits(results[0], optimizer.state[params[2]]["exp_avg"])


class Allocated(TorchDispatchMode):
    """Sums the bytes of all storages that operations allocate, temporaries included."""

    def __init__(self, held=()):
        super().__init__()
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in held}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.seen and "set_" not in str(func):
                    self.seen.add(storage.data_ptr())
                    self.bytes += storage.nbytes()
        return out


@pytest.mark.skipif(bool(onepass.ops.missing), reason=onepass.ops.missing or "-")
@pytest.mark.parametrize("states", ["fp32", "bf16"])
def test_step_allocates_less_than_1_mib(states):
    """Measures the storages of torch and the peak memory of the process for 64 MiB of weights."""
    import resource

    params = [torch.nn.Parameter(torch.ones(1 << 24)), torch.nn.Parameter(torch.ones(1000, 33))]
    optimizer = onepass.AdamW(params, states=states)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Allocated() as allocated:
        for _ in range(3):
            optimizer.step()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert allocated.bytes < 1 << 20
    assert grown < 1 << 10  # ru_maxrss is in KiB


def test_first_step_allocates_only_states():
    params = [torch.nn.Parameter(torch.ones(1 << 20))]
    params[0].grad = torch.ones(1 << 20)
    optimizer = onepass.AdamW(params)
    with Allocated([params[0], params[0].grad]) as allocated:
        optimizer.step()
    held = 2 * 4 << 20
    assert held <= allocated.bytes < held + (1 << 20)
    held_now = sum(
        v.untyped_storage().nbytes() for s in optimizer.state.values() for v in s.values()
    )
    # The fp32 step counter, and the fp32 flag that says whether a step was taken.
    assert held_now == held + 2 * 4
