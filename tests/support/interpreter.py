"""A faster Triton interpreter, with the same results."""

from __future__ import annotations

import dataclasses
from typing import Any


def speed_up() -> None:
    """Removes work that Triton 3.7's interpreter repeats for every operation.

    The results are the same. An interpreter with other internals is left as it is.
    """
    try:
        from triton.runtime import interpreter

        _patch_once_per_launch(interpreter)
        _skip_ignored_overflow_checks(interpreter)
        _cache_types(interpreter)
        _cache_operands(interpreter)
        _pass_semantic_directly(interpreter)
    except (ImportError, AttributeError, TypeError):
        return


def _patch_once_per_launch(interpreter: Any) -> None:
    """Patches triton.language once per launch instead of at every call inside a kernel.

    The patch of the launch stays in place until the launch ends.
    """
    patch, scope_type = interpreter._patch_lang, interpreter._LangPatchScope
    core = interpreter.tl.core
    done: set[bool] = set()
    kinds: dict[Any, bool] = {}

    def patch_lang(fn: Any) -> Any:
        # Functions of Triton call operations of triton.language.core; kernels of other modules do
        # not.
        if fn not in kinds:
            kinds[fn] = any(value is core for value in fn.__globals__.values())
        kind = kinds[fn]
        if kind in done:
            return scope_type()
        outermost = not done
        done.add(kind)
        scope = patch(fn)
        if outermost:
            restore = scope.restore

            def restore_all() -> None:
                done.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang


def _skip_ignored_overflow_checks(interpreter: Any) -> None:
    """Skips the overflow checks of 32-bit integers.

    The interpreter computes them and then ignores the result unless its option `debug` is on.
    """
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _cache_types(interpreter: Any) -> None:
    """Builds each block type, its shape and its NumPy dtype once."""
    core = interpreter.tl.core
    numpy_dtype, with_element_ty = interpreter._get_np_dtype, core.block_type.with_element_ty
    dtypes: dict[str, Any] = {}
    blocks: dict[tuple[str, str], Any] = {}
    shapes: dict[str, Any] = {}

    def cached_numpy_dtype(kind: Any) -> Any:
        name = kind.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(kind)
        return dtypes[name]

    def cached_with_element_ty(self: Any, scalar: Any) -> Any:
        key = scalar.name, self.name
        if key not in blocks:
            blocks[key] = with_element_ty(self, scalar)
        return blocks[key]

    original, original_block = core.tensor.__init__, core.block_type.__init__
    made: dict[Any, Any] = {}

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(n, "value", n) for n in shape)
        if key not in made:
            original_block(self, element_ty, shape)
            made[key] = self
            return
        self.__dict__.update(made[key].__dict__)

    def init(self: Any, handle: Any, type: Any) -> None:
        name = type.name
        if name not in shapes:
            original(self, handle, type)
            shapes[name] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[name]

    interpreter._get_np_dtype = cached_numpy_dtype
    core.block_type.with_element_ty = cached_with_element_ty
    core.tensor.__init__ = init
    core.block_type.__init__ = block_init


def _cache_operands(interpreter: Any) -> None:
    """Checks and converts the operands of each combination of types once.

    A number becomes a block of its value, which is kept; no operation writes to its operands.
    """
    semantic, core = type(interpreter.interpreter_semantic), interpreter.tl.core
    tensor, original = core.tensor, semantic.binary_op_type_checking_impl
    unchanged: set[Any] = set()  # types of pairs of tensors that are returned as they are
    blocks: dict[Any, Any] = {}

    def of_numbers(self: Any, lhs: Any, rhs: Any, args: Any) -> Any:
        left = type(lhs) is tensor
        given, number = (lhs, rhs) if left else (rhs, lhs)
        if type(given) is not tensor or type(number) not in (int, float):
            return original(self, lhs, rhs, *args)
        key = given.type.name, left, type(number), repr(number), args
        if key in blocks:
            return (given, blocks[key]) if left else (blocks[key], given)
        found = original(self, lhs, rhs, *args)
        if found[not left] is given:  # otherwise, it was converted too
            if len(blocks) == 1000:
                blocks.clear()
            blocks[key] = found[left]
        return found

    def checked(self: Any, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            return original(self, lhs, rhs, *args, **kwargs)
        if type(lhs) is not tensor or type(rhs) is not tensor:
            return of_numbers(self, lhs, rhs, args)
        key = lhs.type.name, rhs.type.name, args
        if key in unchanged:
            return lhs, rhs
        found = original(self, lhs, rhs, *args)
        if found[0] is lhs and found[1] is rhs:
            unchanged.add(key)
        return found

    semantic.binary_op_type_checking_impl = checked


def _pass_semantic_directly(interpreter: Any) -> None:
    """Calls each operation directly instead of through two functions that add an argument."""
    core, semantic = interpreter.tl.core, interpreter.interpreter_semantic
    builtin_code = core.builtin(lambda: None).__code__

    def patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = member
        if getattr(member, "__code__", None) is builtin_code:
            function = member.__wrapped__

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    unwrap = core._unwrap_if_constexpr
    plain = {core.tensor, int, float, bool, str, type(None), core.dtype}

    def unwrap_if_constexpr(value: Any) -> Any:
        return value if type(value) in plain else unwrap(value)

    interpreter._patch_attr = patch_attr
    core._unwrap_if_constexpr = unwrap_if_constexpr
