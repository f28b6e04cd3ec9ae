"""Triton's interpreter without what it does again and again."""

from __future__ import annotations

from typing import Any


def patch_once() -> None:
    """Has a launch put the interpreted operations into triton.language once.

    Triton 3.7 does so at every call of a function inside a kernel too, which changes nothing, for
    they are in place until the launch ends, and was half the time of these tests. A Triton that is
    made otherwise is left as it is.
    """
    try:
        from triton.runtime import interpreter

        patch, scope_type = interpreter._patch_lang, interpreter._LangPatchScope
        core = interpreter.tl.core
    except (ImportError, AttributeError):
        return
    done: set[bool] = set()

    def patch_lang(fn: Any) -> Any:
        # Functions of triton's own see the operations in triton.language.core, kernels do not.
        kind = any(value is core for value in fn.__globals__.values())
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
