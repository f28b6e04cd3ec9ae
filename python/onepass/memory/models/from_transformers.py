"""Models that transformers builds from a configuration, on the meta device."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any

import torch

from ...integrations.other_libraries import load
from ...suggestions import did_you_mean
from .shapes import Model, of_module

# Without an architecture in the configuration: the first of these that the model type has.
_TASKS = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)
_POSITIVE = frozenset(
    ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "vocab_size", "hidden_size")
)
_COUNTS = ("layers", "layer", "heads", "head", "experts", "blocks", "_size")  # ends of keys


def missing() -> str:
    """The reason why transformers cannot be used here; empty if it can."""
    return load("transformers", "transformers")[1]


def of_transformers(config: Mapping[str, Any], name: str, source: str) -> Model:
    """The model of a configuration, with each shared parameter once.

    The class is the first of ``architectures`` in the configuration that transformers has, else the
    class of the first task in which the model type is registered. Quantization in the configuration
    is ignored: training needs weights in the dtype of the run.

    Args:
        config: the contents of a config.json.
        name: the name of the model.
        source: the path of the file, for messages.

    Raises:
        ValueError: transformers does not know the model type or cannot build the model, or a count
            of the configuration is out of range.
    """
    transformers, why = load("transformers", "transformers")
    if transformers is None:
        raise ValueError(f"{source}: transformers is needed to read it: {why}")
    version, family = transformers.__version__, config["model_type"]
    if family not in transformers.CONFIG_MAPPING:
        known = list(transformers.CONFIG_MAPPING)
        raise ValueError(
            f"{source}: transformers {version} has no model_type {family!r}"
            f"{did_you_mean(family, known) or '.'} Give the model as module:factory, or install a "
            "version of transformers that has it"
        )
    _check_counts(config, source, family)
    try:
        with _silenced(), torch.device("meta"):
            found = transformers.CONFIG_MAPPING[family].from_dict(dict(config))
            model = _build(transformers, found)
    except Exception as error:  # transformers can raise anything for a bad configuration
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{source} is not a valid configuration of {family}: transformers {version} raised "
            f"{type(error).__name__}: {first}"
        ) from error
    return replace(of_module(model, name, source), config=sizes_of(found, model))


def sizes_of(config: Any, model: torch.nn.Module) -> dict[str, Any]:
    """The sizes that the formula of activations needs; see :class:`Model`."""
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {key: getattr(config, key, None) for key in keys}
    inner = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")
    width = next((n for key in inner if (n := getattr(config, key, None))), None)
    if width is None and hasattr(config, "n_inner"):  # None is GPT-2's default
        width = 4 * config.hidden_size
    names = ("hidden_act", "activation_function", "hidden_activation")
    act = next((n for key in names if (n := getattr(config, key, None))), None)
    logits = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM"))
    head = getattr(config, "vocab_size", 0) if logits else 0
    return {**sizes, "intermediate_size": width, "hidden_act": act, "head": head}


def as_mapping(config: Any) -> Mapping[str, Any]:
    """A configuration as a mapping; empty if it is not one."""
    if isinstance(config, Mapping):
        return config
    to_dict = getattr(config, "to_dict", None)
    found = to_dict() if callable(to_dict) else {}
    return found if isinstance(found, Mapping) else {}


def _build(transformers: Any, config: Any) -> torch.nn.Module:
    """The model of a configuration, on the current device."""
    for architecture in config.architectures or ():
        made = getattr(transformers, architecture, None)
        if made is not None:
            model: torch.nn.Module = made._from_config(config)
            return model
    for task in _TASKS:
        auto = getattr(transformers, task, None)
        if auto is not None and type(config) in auto._model_mapping:
            model = auto.from_config(config)
            return model
    raise ValueError("no task has a model for this configuration")


def _check_counts(config: Mapping[str, Any], source: str, family: str) -> None:
    """Raises ValueError for a negative count or size, and for no layers or an empty vocabulary.

    transformers builds a model without layers for a negative number of layers. Other numbers can be
    negative, such as -1 for a missing token.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_counts(value, source, family)
        elif isinstance(value, int) and not isinstance(value, bool) and key.endswith(_COUNTS):
            least = int(key in _POSITIVE)
            if value < least:
                raise ValueError(
                    f"{source} is not a valid configuration of {family}: {key} must be an integer "
                    f">= {least}; got {value}"
                )


@contextmanager
def _silenced() -> Iterator[None]:
    """Hides what transformers prints and warns while it builds a model."""
    silenced = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with (
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),
            redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(silenced)
