"""The classes in use like torch.optim: groups, schedulers, hooks, saving and errors."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch

import onepass

from .cases import CASES, clone, make_params, same_bits, set_grads, train

# --- signatures ---


@pytest.mark.parametrize("case", [c for c in CASES if c.torch], ids=lambda c: c.name)
def test_positional_order_and_defaults_are_torchs(case):
    theirs = [
        (name, p.default)
        for name, p in inspect.signature(case.torch).parameters.items()
        if p.kind is p.POSITIONAL_OR_KEYWORD
        and name not in ("foreach", "maximize", "capturable", "differentiable", "fused")
    ]
    ours = [
        (name, p.default)
        for name, p in inspect.signature(case.ours).parameters.items()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert ours == theirs


# --- features of torch.optim ---


def test_groups_overrides_and_add_param_group():
    params = make_params([(9,), (9,), (9,)], torch.float32, 1)
    with torch.no_grad():
        for p in params[1:]:
            p.copy_(params[0])
    optimizer = onepass.AdamW(
        [{"params": params[:1]}, {"params": params[1:2], "lr": 0.5, "states": "bf16"}], lr=0.1
    )
    grad = torch.randn(9)
    for p in params:
        p.grad = grad.clone()
    optimizer.step()
    optimizer.add_param_group({"params": params[2], "betas": (0.5, 0.5)})
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[params[2]]["step"] == 1
    assert not torch.equal(params[0], params[1])
    alone = torch.nn.Parameter(make_params([(9,)], torch.float32, 1)[0].detach())
    other = onepass.AdamW([alone], lr=0.1, betas=(0.5, 0.5))
    alone.grad = grad.clone()
    other.step()
    assert same_bits(alone.detach(), params[2].detach())


def test_a_generator_of_named_parameters():
    model = torch.nn.Linear(3, 2)
    optimizer = onepass.AdamW(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    onepass.SGD(p for p in model.parameters())


def test_closure_hooks_and_zero_grad():
    param = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = onepass.SGD([param], lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        seen.append("closure")
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert seen == ["pre", "closure", "post"]
    torch.testing.assert_close(param.detach(), torch.tensor([0.8, 1.6]))
    optimizer.register_state_dict_post_hook(lambda _, d: {**d, "extra": 1})
    assert optimizer.state_dict()["extra"] == 1
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[-1] == "loaded"


@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers_and_a_tensor_lr(as_tensor):
    params, twin = make_params([(50,)], torch.float32, 1), make_params([(50,)], torch.float32, 1)
    ours = onepass.AdamW(params, lr=torch.tensor(0.1) if as_tensor else 0.1)
    theirs = torch.optim.AdamW(twin, lr=0.1)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 20) for o in (ours, theirs)]
    for step in range(19):
        for optimizer, ps, scheduler in zip(
            (ours, theirs), (params, twin), schedulers, strict=True
        ):
            set_grads(ps, torch.float32, step)
            optimizer.step()
            scheduler.step()
    # OneCycleLR also cycles beta1, and the bias correction follows it as in torch.optim.
    assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]
    torch.testing.assert_close(params[0], twin[0], rtol=1e-5, atol=1e-5)


def test_grad_scaler_unscales_before_the_step():
    params = make_params([(50,)], torch.float32, 1)
    weights = clone(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, plain = onepass.AdamW(params), onepass.AdamW(weights)
    for step in range(3):
        set_grads(weights, torch.float32, step)
        plain.step()
        scaler.scale(torch.ones(()))
        params[0].grad = weights[0].grad * 1024.0
        scaler.step(scaled)
        scaler.update()
    assert same_bits(params[0].detach(), weights[0].detach())


def test_autograd_notices_that_weights_changed():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = onepass.SGD([weight], lr=0.1)
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_training_step():
    """torch.compile compiles the model and calls the step as an op."""

    def losses(compiled):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        optimizer = onepass.AdamW(model.parameters(), lr=1e-2)
        x = torch.randn(4, 8)

        def train_step():
            optimizer.zero_grad()
            loss = (model(x) ** 2).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = torch.compile(train_step, backend="eager") if compiled else train_step
        return torch.stack([run() for _ in range(4)])

    torch.testing.assert_close(losses(True), losses(False))


def test_nan_gradients_show_in_the_weight():
    for case in CASES:
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = case.ours([param])
        param.grad = torch.tensor([1.0, math.nan, -1.0])
        optimizer.step()
        assert param.isnan().tolist() == [False, True, False], case.name


# --- invalid arguments ---

NAN, INF = math.nan, math.inf
BAD_OPTIONS = [
    (onepass.AdamW, {"lr": -1.0}, r"lr must be .*>= 0.*; got -1.0"),
    (onepass.AdamW, {"lr": NAN}, "lr must be .*; got nan"),
    (onepass.AdamW, {"lr": INF}, "lr must be .*; got inf"),
    (onepass.AdamW, {"lr": "1e-3x"}, "lr must be .*; got '1e-3x'"),
    (onepass.AdamW, {"lr": torch.ones(2)}, "lr must be"),
    (onepass.AdamW, {"eps": -1e-8}, "eps must be a finite number >= 0; got -1e-08"),
    (onepass.RMSprop, {"eps": NAN}, "eps must be .* got nan"),
    (onepass.AdamW, {"betas": (1.0, 0.9)}, r"betas\[0\] must be a number in \[0, 1\); got 1.0"),
    (onepass.Lion, {"betas": (0.9, -0.1)}, r"betas\[1\] must be .* got -0.1"),
    (onepass.Lion, {"betas": 0.9}, "betas must be a pair"),
    (onepass.AdamW, {"weight_decay": -1}, "weight_decay must be"),
    (onepass.SGD, {"momentum": INF}, "momentum must be"),
    (onepass.SGD, {"nesterov": True}, "nesterov needs momentum > 0"),
    (onepass.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening=0.1"),
    (onepass.RMSprop, {"alpha": 1.5}, r"alpha must be a number in \[0, 1\); got 1.5"),
    (onepass.Adagrad, {"lr_decay": -1}, "lr_decay must be"),
    (onepass.Adagrad, {"initial_accumulator_value": NAN}, "initial_accumulator_value must be"),
    (
        onepass.AdamW,
        {"states": "fp8"},
        "states must be one of 'fp32', 'bf16', 'mx8', 'mx4', 'dynamic8'; got 'fp8'",
    ),
    (
        onepass.AdamW,
        {"weights": "fp24"},
        "weights must be one of 'native', 'stochastic', 'kahan', 'master', 'split16', 'split8'; "
        "got 'fp24'",
    ),
    (onepass.AdamW, {"weights": "master"}, "weights='master' is for bfloat16, float16 weights; "),
    (
        onepass.AdamW,
        {"backend": "cudnn"},
        "backend must be None or one of cpu, cuda, triton, reference; got 'cudnn'",
    ),
    (onepass.AdamW, {"seed": -1}, "seed must be an integer"),
]


@pytest.mark.parametrize(("cls", "options", "message"), BAD_OPTIONS)
def test_bad_options_name_the_argument_the_value_and_the_need(cls, options, message):
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        cls([param], **options)
    if "backend" in options:
        return
    optimizer = cls([param])
    other = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [other], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a finite number >= 0; got -1.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be a finite number >= 0; got nan"),
        ({"max_grad_norm": "1"}, "max_grad_norm must be a finite number >= 0; got '1'"),
        ({"norm_type": 1.0}, "norm_type must be 2.0 or math.inf; got 1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be a number in \[0, 1\); got 1.0"),
        ({"ema_decay": -0.1}, r"ema_decay must be a number in \[0, 1\); got -0.1"),
    ],
)
def test_options_of_the_step_out_of_range_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        onepass.AdamW([torch.nn.Parameter(torch.ones(2))], **option)


def test_a_mistyped_option_is_refused():
    with pytest.raises(TypeError, match="weight_decoy"):
        onepass.AdamW([torch.nn.Parameter(torch.ones(2))], weight_decoy=0.1)


def test_complex_double_and_integer_parameters_are_refused():
    for dtype, message in [
        (torch.complex64, "is complex"),
        (torch.float64, "must be float32, bfloat16, float16; got torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            onepass.AdamW([torch.nn.Parameter(torch.ones(2, dtype=dtype))])


@pytest.mark.parametrize("change", ["sparse", "lr", "beta", "states", "overlap"])
def test_an_error_in_a_step_changes_nothing(change):
    params = make_params([(5,), (6, 4)], torch.float32, 1)
    optimizer = onepass.AdamW(params)
    train(optimizer, params, 2)
    set_grads(params, torch.float32, 9)
    group = optimizer.param_groups[0]
    error, message = ValueError, change
    if change == "sparse":
        params[1].grad = params[1].grad.to_sparse()
        error, message = RuntimeError, "does not support sparse gradients: parameter 1"
    elif change == "lr":
        group["lr"] = NAN
    elif change == "beta":
        group["betas"] = (0.9, 2.0)
    elif change == "states":
        group["states"] = "fp4"
    else:
        params[1].data = torch.ones(1).expand(6, 4)
        message = "leave gaps or overlap"
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    with pytest.raises(error, match=message):
        optimizer.step()
    after = (params, optimizer.state_dict()["state"])
    for p, q in zip(before[0], after[0], strict=True):
        assert torch.equal(p, q)
    for i in before[1]:
        for key in before[1][i]:
            assert torch.equal(before[1][i][key], after[1][i][key])
