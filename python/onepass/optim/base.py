"""The optimizer that all classes share: options, state dicts, and the step through the plan."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, ClassVar

import torch
from typing_extensions import TypedDict  # torch's own dependency

from .. import backends
from ..checks import check_lr, check_param, check_weight_format
from ..formats import STATE_FORMATS, VERSION, WEIGHT_FORMATS, scale_key
from ..plan import ParamState, Plan
from ..rules import RULES, Rule
from ..states import COMPANIONS, STRIDE, fit_companion, fit_states, packed_order

# Options that describe this run, not the state of training: loading a state dict keeps them.
_OWN_OPTIONS = ("states", "weights", "format_version")


class Options(TypedDict, total=False):
    """The keyword-only options that every class takes.

    Attributes:
        maximize: ascend instead of descend (default False).
        decoupled_weight_decay: take lr * weight_decay * param off the weight instead of adding
            weight_decay * param to the gradient (default: True for AdamW and Lion).
        states: format of the states, also per parameter group: "fp32" (default; classes named for
            their bits have another), "bf16", "mx8", "mx4" or "dynamic8" (docs/formats.md).
        weights: how bf16 and fp16 weights keep their precision, also per group: "native" (default),
            rounded to nearest, "stochastic", "kahan", "master"; bf16 alone "split16", "split8".
        paged, max_grad_norm, skip_nonfinite: not available yet; only their defaults, False, None
            and False, are accepted.
        backend: None (default) picks one per device; or "cpu", "triton" or "reference".
        seed: key of the random bits that stochastic formats draw, also per group (default 0).
    """

    maximize: bool
    decoupled_weight_decay: bool | None
    states: str | None
    weights: str
    paged: bool | int
    max_grad_norm: float | None
    skip_nonfinite: bool
    backend: str | None
    seed: int


class Optimizer(torch.optim.Optimizer):
    """A torch optimizer whose step is one pass over memory.

    Parameters are updated in place; so are the states in ``state[param]``, which have
    torch.optim's names and, but in packed formats, the parameter's shape and strides; formats in
    blocks add ``<name>_scale``, weight formats a companion. They are made at a parameter's first
    step. ``state[param]["step"]`` is one tensor shared by all
    parameters that took the same steps. The bits of the results do not depend on the backend, the
    number of threads or the instruction set.

    Parameters may be float32, bfloat16 or float16, of any shape and dense strides, gradients
    likewise, not necessarily of the parameter's dtype.
    """

    rule: ClassVar[Rule]
    decoupled: ClassVar[bool] = False
    """The class's own kind of weight decay."""
    default_states: ClassVar[str] = "fp32"
    """The class's own format of states."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool | None = None,
        states: str | None = None,
        weights: str = "native",
        paged: bool | int = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        backend: str | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, instead in (
            ("paged", paged, "states stay on the parameter's device"),
            ("max_grad_norm", max_grad_norm, "use torch.nn.utils.clip_grad_norm_ before step()"),
            ("skip_nonfinite", skip_nonfinite, "check the gradients before step()"),
        ):
            if value not in (False, None):
                raise NotImplementedError(f"{name}={value!r} is not available yet: {instead}")
        backends.check_name(backend)
        self.backend = backend
        self._plan: Plan | None = None
        if decoupled_weight_decay is None:
            decoupled_weight_decay = self.decoupled
        options = {
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "states": self.default_states if states is None else states,
            "weights": weights,
            "seed": seed,
            "format_version": VERSION,
        }
        super().__init__(params, {**defaults, **options})
        self.state = defaultdict(ParamState)

    # --- options ---

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError for an option of a group that is out of range, naming it."""
        check_lr(group["lr"])
        check_number("weight_decay", group["weight_decay"])
        if "eps" in group:
            check_number("eps", group["eps"])
        for i, beta in enumerate(_pair("betas", group["betas"]) if "betas" in group else ()):
            check_fraction(f"betas[{i}]", beta)
        check_choice("states", group["states"], STATE_FORMATS)
        check_choice("weights", group["weights"], WEIGHT_FORMATS)
        seed = group["seed"]
        if not isinstance(seed, int) or not 0 <= seed < 1 << 63:
            raise ValueError(f"seed must be an integer in [0, 2**63); got {seed!r}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim does; its options are checked first.

        Raises:
            ValueError: an option out of range, or a parameter that is complex or of a dtype other
                than float32, bfloat16 and float16; the optimizer stays as it was.
        """
        if isinstance(param_group, dict):
            self.check_options({**self.defaults, **param_group})
            params = param_group.get("params")
            if isinstance(params, torch.Tensor):
                params = [params]
            elif isinstance(params, Iterable) and not isinstance(params, (set, frozenset)):
                params = param_group["params"] = list(params)
            for i, param in enumerate(params or ()):
                tensor = param[1] if isinstance(param, tuple) and len(param) == 2 else param
                if isinstance(tensor, torch.Tensor):
                    which = f"parameter {i} of the group, shape {tuple(tensor.shape)},"
                    check_param(tensor, which)
                    weights = param_group.get("weights", self.defaults["weights"])
                    check_weight_format(tensor, weights, which)
        super().add_param_group(param_group)

    # --- the step ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step: updates parameters and states in place; gradients are only read.

        Args:
            closure: called with gradients enabled first, as torch.optim does.

        Returns:
            What closure returned, else None.

        Raises:
            ValueError, RuntimeError: an option, parameter or gradient that cannot be worked on;
                nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._planned_step()
        return loss

    # torch.compile breaks its graph here: there is nothing in a plan for it to fuse.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _planned_step(self) -> None:
        if self._plan is None or not self._plan.step():
            self._plan = None
            plan = Plan(self)
            if not plan.step():
                raise RuntimeError("onepass: a tensor changed while the step was planned")
            self._plan = plan

    # --- saving and loading ---

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plan = None
        super().__setstate__(state)

    def state_dict(self) -> dict[str, Any]:
        """The state as torch.optim has it: with ``states="fp32"``, torch.optim loads it.

        The step counter of each parameter is a tensor of its own here.
        """
        result = super().state_dict()
        result["state"] = {
            key: {k: v.clone() if k == "step" else v for k, v in value.items()}
            if isinstance(value, dict)
            else value
            for key, value in result["state"].items()
        }
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, or of its twin in torch.optim.

        Tensors are copied, converted to this optimizer's own ``states`` and ``weights`` formats (to
        nearest) and moved to the parameter's device; the other options are taken from the state
        dict. Load the model's weights first: a companion of another format than saved is made from
        the weight as it is.

        Raises:
            ValueError: it belongs to another model or another kind of optimizer, or its formats to
                a newer onepass; says where they differ. Nothing has been changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        groups = self._loaded_groups(state_dict["param_groups"])
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        pairs = zip(groups, state_dict["param_groups"], strict=True)
        members = [(p, g, saved.get("states", "")) for g, saved in pairs for p in g["params"]]
        owners = {
            i: (param, number, group, saved_as)
            for number, (i, (param, group, saved_as)) in enumerate(zip(ids, members, strict=True))
        }
        state: defaultdict[Any, Any] = defaultdict(ParamState)
        for key, value in state_dict["state"].items():
            if key in owners:
                state[owners[key][0]] = self._loaded_state(value, *owners[key])
            else:
                state[key] = value
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _loaded_groups(self, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"the state dict has {len(saved_groups)} parameter groups, "
                f"the optimizer {len(self.param_groups)}"
            )
        groups = []
        for i, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    f"parameter group {i} has {len(saved['params'])} parameters in the state dict, "
                    f"{len(group['params'])} in the optimizer"
                )
            version = saved.get("format_version", VERSION)
            if version != VERSION:
                raise ValueError(
                    f"parameter group {i} of the state dict has formats of version {version}; this "
                    f"onepass knows version {VERSION}: load it with the onepass that saved it"
                )
            merged = {**group, **deepcopy({k: v for k, v in saved.items() if k != "params"})}
            # A state dict of torch.optim does not name states; its Adam and AdamW differ only in
            # where decay goes, and each class keeps its own way.
            kept = _OWN_OPTIONS if "states" in saved else (*_OWN_OPTIONS, "decoupled_weight_decay")
            merged.update({name: group[name] for name in kept})
            self.check_options(merged)
            groups.append(merged)
        return groups

    def _loaded_state(
        self,
        saved: Mapping[str, Any],
        param: torch.Tensor,
        number: int,
        group: Mapping[str, Any],
        saved_as: str,
    ) -> ParamState:
        rule = self.rule
        which = f"parameter {number} of shape {tuple(param.shape)}"
        check_weight_format(param, group["weights"], which)
        saved = {key: value for key, value in saved.items() if value is not None}
        keys = [key for _, key in rule.state_slots(rule.flag_bits(group))]
        missing = [key for key in keys if key not in saved]
        if rule.needs_step and "step" not in saved:
            missing.append("step")
        # SGD makes its buffer when momentum is first used.
        if saved and missing and not (rule.name == "sgd" and missing == ["momentum_buffer"]):
            raise ValueError(
                f"the state dict has no {', '.join(missing)} for {which}, only "
                f"{', '.join(map(str, saved)) or 'nothing'}: it is of another kind of optimizer "
                f"than {type(self).__name__}"
            )
        form, weight = STATE_FORMATS[group["states"]], WEIGHT_FORMATS[group["weights"]]
        states = fit_states(saved, param, rule, form, which, copy=True, saved_as=saved_as)
        moments = {key for key, _, _ in rule.slots}
        known = moments | {scale_key(key) for key in moments} | COMPANIONS | {STRIDE}
        state = ParamState()
        for key, value in saved.items():
            if key == "step":
                state[key] = torch.tensor(float(value), dtype=torch.float32)
            elif key not in known:
                state[key] = deepcopy(value)
        state.form = form.name
        if states:
            state.update(states, **packed_order(param, form))
        if any(key in saved for key in COMPANIONS):
            companion = fit_companion(saved, param, weight, which, copy=True)
            if companion is not None:
                state[weight.key] = companion
        # Lion, RMSprop and SGD run without the count, which other libraries do not save for them:
        # it then starts here.
        if state:
            state.setdefault("step", torch.tensor(0.0))
        return state


def rule_named(name: str) -> Rule:
    """The rule of an optimizer class."""
    return RULES[name]


def check_number(name: str, value: Any, least: float = 0.0) -> None:
    """Raises ValueError unless value is a finite number of at least ``least``."""
    if not _is_number(value) or not least <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number >= {least:g}; got {_shown(value)}")


def check_fraction(name: str, value: Any) -> None:
    """Raises ValueError unless value is a number in [0, 1)."""
    if not _is_number(value) or not 0.0 <= float(value) < 1.0:
        raise ValueError(f"{name} must be a number in [0, 1); got {_shown(value)}")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises ValueError unless value is one of the known names."""
    if value not in (names := list(known)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}; got {value!r}")


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of numbers; got {value!r}")
    return value[0], value[1]


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float)) or hasattr(value, "__float__")


def _shown(value: Any) -> str:
    return str(float(value)) if _is_number(value) else repr(value)
