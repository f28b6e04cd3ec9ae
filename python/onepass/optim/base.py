"""The base class of all optimizers: options, state dicts and the entry points of a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch.autograd import _profiler_enabled as profiler_enabled  # type: ignore[attr-defined]
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from typing_extensions import Unpack

from ..checkpoints.loading import loaded_groups, loaded_state
from ..checkpoints.saving import saved_dict
from ..distributed.fsdp1 import check_reader
from ..engine.change_record import ChangeRecord
from ..engine.state_tracking import OptimizerState
from ..engine.tensor_access import is_dtensor
from ..engine.validation import check_dense, check_param, check_weight_format
from ..paging.options import Paging
from ..paging.pager import Pager
from ..rules.group_options import DEFAULTS, GROUP_KEYWORDS, drop_defaults, option
from .compile_op import register
from .group_checks import check_names, check_rule_options, check_torch_keywords, check_values
from .keywords import KEYWORDS, STEP_KEYWORDS, STEP_WIDE, TORCH_KEYWORDS, defaults_of
from .options import Options, describe, refuse, torch_keys
from .stepping import Stepping

# Attributes that copies and pickles keep.
_SETTINGS = (
    *(keyword.attribute for keyword in STEP_KEYWORDS),
    "scales_in_step",
    "_given",
    "_failed",
)


class Optimizer(Stepping):
    """A torch optimizer whose step is one pass over memory.

    Parameters and the states in ``state[param]`` are updated in place. States have torch.optim's
    names. They also have the parameter's shape and strides, except in packed formats. Formats in
    blocks add ``<name>_scale``; weight formats add a companion, which stores extra bits of the
    weight. States are allocated at a parameter's first step. ``state[param]["step"]`` is one tensor
    that all parameters with the same number of steps share. The result bits do not depend on the
    backend, the number of threads or the instruction set.

    Parameters and gradients may be float32, bfloat16 or float16, of any shape with dense strides.
    A gradient may have another dtype than its parameter.
    """

    decoupled: ClassVar[bool] = False
    """Whether weight decay is decoupled by default."""
    default_states: ClassVar[str] = "fp32"
    """The default format of the states."""
    default_paged: ClassVar[bool] = False
    """Whether the class pages states by default."""
    group_options: ClassVar[tuple[str, ...]] = ()
    """Options of groups that the constructor does not take."""
    needs_matrices: ClassVar[bool] = False
    """Whether parameters that are not matrices need a group of their own."""
    paging: Paging | None = None
    pager: Pager | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        describe(cls, defaults_of(cls))

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Unpack[Options]) -> None:
        given: dict[str, Any] = {**options}
        o = defaults_of(type(self))
        for name in given.keys() - o.keys():
            refuse(name, type(self).__name__, {*inspect.signature(type(self)).parameters})
        own = {keyword.name for keyword in KEYWORDS if keyword.class_default}
        # None selects the class's own default.
        o |= {k: value for k, value in given.items() if value is not None or k not in own}
        if o["fused"] and o["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        check_torch_keywords(o)
        for keyword in STEP_KEYWORDS:
            keyword.check(keyword.name, o[keyword.name])
            setattr(self, keyword.attribute, keyword.read(o[keyword.name]))
        self.pager = None if self.paging is None else Pager(self.paging, self.rule)
        self.changes = ChangeRecord() if self.track_changes else None
        self.scales_in_step = bool(o["fused"])
        self._given = {name: given[name] for name in STEP_WIDE & given.keys()}
        self._plan = self.verdict = None
        self._failed = ""
        self._found = None
        self.captured = []
        self._swapped = False
        self.moved = {}
        self.released = None
        self._number = register(self)
        named = torch_keys(type(self))
        kept = {k.name: o[k.name] for k in TORCH_KEYWORDS if k.name in named}
        kept |= {k.name: o[k.name] for k in GROUP_KEYWORDS}
        shared = {**defaults, **kept}
        self.defaults = shared
        self.check_options(shared)
        drop_defaults(shared, named)
        super().__init__(params, shared)
        self.state = OptimizerState()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves unscaling and skipping to step().

        True with fused=True, as in torch.optim, and during a step of :class:`onepass.GradScaler`.
        """
        return self.scales_in_step

    def __repr__(self) -> str:
        wide = {k.name: getattr(self, k.attribute) for k in STEP_KEYWORDS}
        usual = {k.name: k.read(k.default) for k in STEP_KEYWORDS}
        wide = {name: value for name, value in wide.items() if value != usual[name]}
        shown = "".join(f"    {name}: {value!r}\n" for name, value in sorted(wide.items()))
        text = super().__repr__()
        return f"{text[:-1]}Whole step\n{shown})" if shown else text

    # --- options ---

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError if an option of a group is out of range or not allowed in a group."""
        own = (*self.defaults, *self.group_options)
        known = frozenset((*own, *(k.name for k in KEYWORDS), *DEFAULTS, "params"))
        check_names(group, known, self._given, type(self).__name__)
        check_values(group)
        check_rule_options(group, self.rule, type(self).__name__)
        self.rule.check(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim does, after a check of its options and parameters.

        Parameters that require no gradient and lazy parameters are checked only at their first
        step: the former may have any dtype, and the latter have no shape yet.

        Raises:
            ValueError: an option is out of range, or a parameter that requires a gradient is not
                float32, bfloat16 or float16, or has strides that leave gaps or overlap. The
                optimizer is not changed.
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
                if not isinstance(tensor, torch.Tensor) or is_lazy(tensor):
                    continue
                if tensor.requires_grad or not tensor.is_leaf:
                    which = f"parameter {i} of the group, shape {tuple(tensor.shape)},"
                    check_param(tensor, which)
                    if tensor.layout == torch.strided and not is_dtensor(tensor):
                        check_dense(tensor, which)
                    weights = option({**self.defaults, **param_group}, "weights")
                    check_weight_format(tensor, weights, which)
        super().add_param_group(param_group)
        drop_defaults(self.param_groups[-1], torch_keys(type(self)))

    # --- the step ---

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Takes one step: updates parameters and states in place.

        Gradients are only read, unless ``zero_grads`` is set. Ctrl-C (SIGINT) does not interrupt
        the update; it is handled after the step.

        Args:
            closure: called first, with gradients enabled, as in torch.optim.

        Returns:
            The result of closure, or None without a closure.

        Raises:
            ValueError, RuntimeError: an option, parameter, gradient or state is not supported.
                Weights, states and counters are not changed.
            RuntimeError: an earlier step failed after it had changed some tensors, for example
                because a kernel launch on a second device failed. Load a checkpoint of the model
                and the optimizer.
            MemoryError: the host has too little free memory for paged states. Nothing is changed.
        """
        # Pass the arguments on unchanged, because hooks receive them.
        if torch.compiler.is_compiling() or _watched(self):
            return self._hooked_step(*args, **kwargs)
        return self._step(*args, **kwargs)

    # torch wraps every step() without this mark in a profiler record and in hooks. The record takes
    # as long as a small plan, so step() uses the wrapped version only with a profiler or a hook.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See :meth:`step`; without hooks."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            params: list[torch.Tensor] = []
            grads: list[torch.Tensor] = []
            for group in self.param_groups:
                self._init_group(group, params, grads)
            zeroing = torch.ops.onepass.optimizer_step_zeroing
            op = zeroing if self.zero_grads else torch.ops.onepass.optimizer_step
            with torch.no_grad():
                op(params, grads, self._number)
            return loss
        # torch.no_grad() would take as long as the work on all groups.
        enabled = torch.is_grad_enabled()
        try:
            try:
                torch.set_grad_enabled(False)
                self.whole_step()
            finally:
                torch.set_grad_enabled(enabled)
        except BaseException:
            # Ctrl-C may interrupt the finally block before it has restored the mode.
            torch.set_grad_enabled(enabled)
            raise
        return loss

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)
    step.__signature__ = inspect.signature(_step)  # type: ignore[attr-defined]

    # torch.compile runs this method instead of tracing it, so states exist before the graph runs.
    def _init_group(
        self, group: dict[str, Any], params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> None:
        self.adopted()
        active = [p for p in group["params"] if p.grad is not None]
        params += active
        grads += [p.grad for p in active]

    # --- saving and loading ---

    def _begin(self) -> None:
        """Drops the plan and all other data of the previous state tensors."""
        self._number = register(self)
        self._plan = self.verdict = self._found = self.released = None
        self._failed = ""
        self._swapped = False
        self.moved = {}
        self.captured = getattr(self, "captured", [])
        if self.pager is not None:
            self.pager.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _SETTINGS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin()
        super().__setstate__(state)
        if self.paging is not None and self.pager is None:
            self.pager = Pager(self.paging, self.rule)
        if self.track_changes:
            if self.changes is None:
                self.changes = ChangeRecord()
            self.changes.mark_loaded()

    def state_dict(self) -> dict[str, Any]:
        """The state dict in torch.optim's form; torch.optim can load it with ``states="fp32"``.

        Each parameter has its own copy of the step counter.

        Raises:
            ValueError: the caller is FSDP1's ``optim_state_dict``, which does not support these
                formats.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        check_reader(self.param_groups)
        result = saved_dict(self.param_groups, self.state, self.rule, torch_keys(type(self)))
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            if changed is not None:
                result = changed
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of the torch.optim class of the same name.

        Tensors are copied to the parameter's device and converted to this optimizer's ``states``
        and ``weights`` formats, rounding to nearest. Other options are taken from the state dict.
        Load the model's weights first, because the conversion of a companion reads the weight.

        Args:
            state_dict: a state dict; it is only read.

        Raises:
            ValueError: the state dict belongs to another model or another kind of optimizer, or
                its formats to a newer version of onepass. The message names the difference.
                Nothing is changed.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        groups = loaded_groups(
            self.param_groups,
            state_dict["param_groups"],
            torch_keys(type(self)),
            self.check_options,
        )
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        pairs = zip(groups, state_dict["param_groups"], strict=True)
        members = [(p, g, saved) for g, saved in pairs for p in g["params"]]
        owners = {
            i: (param, number, group, saved)
            for number, (i, (param, group, saved)) in enumerate(zip(ids, members, strict=True))
        }
        state, pager, kind = OptimizerState(), self.pager, type(self).__name__
        paged = set() if pager is None else pager.announce(groups)
        for key, value in state_dict["state"].items():
            if key in owners:
                param = owners[key][0]
                home = pager.home if pager is not None and param in paged else None
                state[param] = loaded_state(self.rule, value, *owners[key], home, kind)
            else:
                state[key] = value
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _watched(optimizer: Optimizer) -> bool:
    """Whether a profiler is running or a step hook is registered."""
    return bool(
        profiler_enabled()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def own_optimizer(optimizer: Any) -> Optimizer:
    """The given onepass optimizer, or the one inside a wrapper such as accelerate's.

    Raises:
        TypeError: the object is not an onepass optimizer and wraps none.
    """
    inner = optimizer
    while not isinstance(inner, Optimizer):
        inner = getattr(inner, "optimizer", None) or getattr(inner, "optim", None)
        if not isinstance(inner, torch.optim.Optimizer):
            kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
            raise TypeError(f"optimizer must be an optimizer of onepass; got {kind}")
    return inner
