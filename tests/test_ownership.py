"""Memory of states is freed as soon as they are replaced, and torch can swap parameters."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import onepass

from .cases import assert_same, same_bits

FORMATS = [("fp32", "native"), ("mx8", "split16"), ("mx4", "kahan"), ("bf16", "master")]
CLASSES = {"adamw": onepass.AdamW, "sgd": lambda p, **k: onepass.SGD(p, momentum=0.9, **k)}


def build(sizes=(1 << 16, 100, 3), dtype=torch.float32, cls=onepass.AdamW, **options):
    params = [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    return params, cls(params, lr=0.1, **options)


def memory_of(optimizer):
    """Weak references to the storages of all states except the step counters."""
    return [
        StorageWeakRef(value.untyped_storage())
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != "step"
    ]


def replace(params, optimizer):
    for param in params:
        for key, value in list(optimizer.state[param].items()):
            if isinstance(value, torch.Tensor):
                optimizer.state[param][key] = value.clone()


def replace_entries(params, optimizer):
    for param in params:
        entry = {k: copy.deepcopy(v) for k, v in optimizer.state[param].items()}
        optimizer.state[param] = entry


def offload(params, optimizer):
    """Replaces the data of each state, as frameworks do to offload it."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.data = value.data.clone()


def another_mapping(params, optimizer):
    from collections import defaultdict

    optimizer.state = defaultdict(dict)


def load(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


CHANGES = {
    "replaced": replace,
    "entries replaced": replace_entries,
    "data replaced": offload,
    "cleared": lambda params, optimizer: optimizer.state.clear(),
    "entries cleared": lambda params, optimizer: [optimizer.state[p].clear() for p in params],
    "popped": lambda params, optimizer: [optimizer.state.pop(p) for p in params],
    "another mapping": another_mapping,
    "loaded": load,
}


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_memory_of_states_is_free_at_once(change, backend, clip):
    gc.disable()
    try:
        for states, weights in FORMATS:
            params, optimizer = build(
                dtype=torch.bfloat16,
                states=states,
                weights=weights,
                backend=backend,
                ema_decay=0.9,
                max_grad_norm=clip,
            )
            optimizer.step()
            optimizer.step()
            old = memory_of(optimizer)
            assert len(old) >= 9
            change(params, optimizer)
            assert all(storage.expired() for storage in old)
            optimizer.step()
    finally:
        gc.enable()


def test_memory_of_released_states_is_free_at_once():
    model = torch.nn.Linear(100, 100)
    optimizer = onepass.AdamW(model.parameters())
    handle = onepass.release_gradients(model, optimizer)
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    gc.disable()
    try:
        old = memory_of(optimizer)
        replace(list(model.parameters()), optimizer)
        assert all(storage.expired() for storage in old)
    finally:
        gc.enable()
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == 2
    handle.remove()


def test_an_optimizer_is_free_with_its_last_reference():
    gc.collect()
    gc.disable()
    try:
        for options in ({}, {"max_grad_norm": 1.0}, {"backend": "reference"}):
            _params, optimizer = build(**options)
            optimizer.step()
            gone, old = weakref.ref(optimizer), memory_of(optimizer)
            del optimizer
            assert gone() is None
            assert all(storage.expired() for storage in old)
    finally:
        gc.enable()


@pytest.mark.parametrize(("states", "weights"), FORMATS)
@pytest.mark.parametrize("options", [{}, {"paged": True}, {"backend": "reference"}], ids=str)
def test_torch_can_swap_parameters_after_a_step(states, weights, options):
    made = []
    for swapped in (False, True):
        params, optimizer = build(
            dtype=torch.bfloat16, states=states, weights=weights, max_grad_norm=1.0, **options
        )
        for step in range(4):
            optimizer.step()
            if swapped:
                for param in params:
                    grad, other = param.grad, torch.nn.Parameter(param.detach().clone())
                    torch.utils.swap_tensors(param, other)
                    param.grad = grad
                    if step == 2:  # swaps in a parameter on the same memory
                        torch.utils.swap_tensors(param, torch.nn.Parameter(param.data))
                        param.grad = grad
        made.append(optimizer)
    assert_same(*made)


def test_modules_move_and_load_where_torch_swaps_their_parameters():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        optimizer = onepass.AdamW(model.parameters(), lr=0.1)

        def step():
            optimizer.zero_grad()
            x = torch.ones(2, 3, dtype=model[0].weight.dtype)
            model(x).float().sum().backward()
            before = model[0].weight.detach().clone()
            optimizer.step()
            assert not torch.equal(before, model[0].weight)

        step()
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        step()
        model.to(torch.bfloat16)
        step()
        assert optimizer.state[model[0].weight]["step"] == 3
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_one_parameters_state_is_saved_alone(cls):
    params, optimizer = build([1000] * 50, cls=cls)
    optimizer.step()
    state = dict(optimizer.state[params[7]])
    expected = sum(v.numel() * v.element_size() for v in state.values())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert buffer.tell() < expected + 3000
    assert len(pickle.dumps(copy.deepcopy(state))) < expected + 3000
    kept = state["exp_avg" if "exp_avg" in state else "momentum_buffer"]
    assert kept.untyped_storage().nbytes() == 4000
    assert kept.storage_offset() == 0


def test_small_states_are_neighbours_and_aligned():
    params, optimizer = build([100] * 20)
    optimizer.step()
    at = [optimizer.state[p][k].data_ptr() for p in params for k in ("exp_avg", "exp_avg_sq")]
    assert all(address % 64 == 0 for address in at)
    assert max(at) - min(at) < 64 * 20 * 2 * 8


@pytest.mark.parametrize("how", ["state dict", "deepcopy", "pickle", "entry"])
@pytest.mark.parametrize("states", ["fp32", "mx8"])
def test_the_step_after_a_skipped_first_step_counts_as_the_first(states, how):
    """SGD's buffer starts at the undampened gradient, even after the skipped step is saved."""
    made = []
    for resumed in (False, True):
        params, optimizer = build(
            [40],
            cls=onepass.SGD,
            momentum=0.9,
            dampening=0.5,
            skip_nonfinite=True,
            states=states,
        )
        params[0].grad[3] = float("inf")
        optimizer.step()
        assert optimizer.skipped_steps == 1
        if resumed and how == "state dict":
            fresh = build([40], cls=onepass.SGD, momentum=0.9, dampening=0.5, states=states)[1]
            fresh.load_state_dict(optimizer.state_dict())
            params, optimizer = fresh.param_groups[0]["params"], fresh
        elif resumed and how == "deepcopy":
            optimizer = copy.deepcopy(optimizer)
        elif resumed and how == "pickle":
            optimizer = pickle.loads(pickle.dumps(optimizer))
        elif resumed:
            optimizer.state[params[0]] = copy.deepcopy(optimizer.state[params[0]])
        params = optimizer.param_groups[0]["params"]
        for _ in range(2):
            params[0].grad = torch.ones(40)
            optimizer.step()
        made.append(params[0].detach())
    assert same_bits(*made)


def test_an_average_that_was_switched_off_starts_anew():
    params, optimizer = build(ema_decay=0.9)
    optimizer.step()
    optimizer.param_groups[0]["ema_decay"] = None
    optimizer.step()
    assert "ema" not in optimizer.state[params[0]]


def test_a_state_dict_loads_where_an_option_adds_a_state():
    params, optimizer = build()
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[params[0]]["max_exp_avg_sq"].any()


@pytest.mark.parametrize("how", ["entry", "deepcopy", "pickle", "loaded"])
def test_codes_of_one_element_keep_their_format(how):
    """Codes of one element have the same shape in mx8 and mx4; only the dtype tells the format."""
    made = []
    for copied in (False, True):
        params, optimizer = build([1], states="mx8")
        optimizer.step()
        optimizer.step()
        if copied and how == "entry":
            optimizer.state[params[0]] = dict(optimizer.state[params[0]])
        elif copied and how == "deepcopy":
            optimizer = copy.deepcopy(optimizer)
        elif copied and how == "pickle":
            optimizer = pickle.loads(pickle.dumps(optimizer))
        elif copied:
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer = copy.deepcopy(optimizer)
        optimizer.param_groups[0]["states"] = "mx4"
        params = optimizer.param_groups[0]["params"]
        params[0].grad = torch.ones(1)
        optimizer.step()
        made.append(params[0].detach())
    assert same_bits(*made)


def test_codes_keep_their_order_while_momentum_is_off():
    """The states of a permuted parameter keep their codes and stride until momentum is on again."""
    weight = torch.nn.Parameter(
        torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    )
    optimizer = onepass.SGD([weight], lr=0.1, momentum=0.9, states="mx4")
    kept = []
    for momentum in (0.9, 0.0, 0.0, 0.0):
        optimizer.param_groups[0]["momentum"] = momentum
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        state = optimizer.state[weight]
        kept.append((state["momentum_buffer"].clone(), state["stride"]))
        optimizer.state[weight] = dict(state)  # a new plan is built
    assert all(torch.equal(codes, kept[0][0]) and at == kept[0][1] for codes, at in kept)
