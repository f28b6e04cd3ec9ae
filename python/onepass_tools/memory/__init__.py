"""`onepass memory`: the memory use of a training run with each optimizer."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from onepass_tools import UsageError
from onepass_tools.memory.defaults import OPTIMIZERS

EPILOG = """\
examples:
  onepass memory --model llama-3-8b --gpu 24GB
  onepass memory --model llama-3-8b --optimizers adamw,lion8bit,adamw+mx8+split8 --plot out.png
  onepass memory --model gpt2 --optimizers adamw8bit --peers --measure
  onepass memory --model mistral-7b --gpu 24GB --recommend --task finetune

Sizes are in powers of 1000 (24GB) or 1024 (24GiB). Activations are not counted: they must fit in
the remaining memory of the GPU. Exit codes: 0 on success; 1 if a measurement of a onepass optimizer
differs from its prediction by more than 0.5 %, or --recommend finds nothing that fits; 2 on wrong
usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `onepass memory`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    what = parser.add_argument_group("model and optimizers")
    what.add_argument(
        "--model",
        help="a name of --list-models, a transformers config.json or its folder, an owner/name in "
        "the cache of the Hugging Face hub, or module:factory",
    )
    what.add_argument(
        "--optimizers",
        metavar="LIST",
        help="optimizers, separated by commas: a class in lower case, with options after a plus "
        f"(adamw+mx8+split8), a peer, or module:factory (default: {OPTIMIZERS})",
    )
    what.add_argument(
        "--peers", action="store_true", help="also include optimizers of other libraries"
    )
    what.add_argument(
        "--list-models", action="store_true", help="list the models with parameters and sources"
    )
    what.add_argument(
        "--list-optimizers", action="store_true", help="list the optimizers, options and peers"
    )

    run = parser.add_argument_group("training run")
    run.add_argument(
        "--dtype", default="bf16", help="dtype of the weights: fp32, bf16 (default) or fp16"
    )
    run.add_argument("--grad-dtype", help="dtype of the gradients (default: that of the weights)")
    run.add_argument(
        "--parameter-groups",
        action="store_true",
        help="norms in fp32, and fp32 states for embeddings and norms, as with onepass.cast_model "
        "and onepass.parameter_groups",
    )
    run.add_argument(
        "--gpu", metavar="GPU", help="the GPU that must be enough: H100, A100, ..., or 24GB"
    )
    run.add_argument("--reserve", metavar="SIZE", help="memory of the GPU to leave for activations")
    run.add_argument(
        "--mesh",
        metavar="SIZES",
        help="the GPUs, for example fsdp=8,tp=2: dp (replicas; with fsdp: HSDP), fsdp or zero3 "
        "(FSDP2), zero2, zero1, tp (tensor parallel), ep (expert parallel)",
    )

    run.add_argument(
        "--sample",
        metavar="BATCHxTOKENS",
        help="count activations of this many sequences and tokens on one GPU, for example 4x2048",
    )
    run.add_argument(
        "--checkpointing", action="store_true", help="with --sample: blocks are computed again"
    )
    run.add_argument("--attention", default="sdpa", help="with --sample: sdpa (default) or eager")

    measured = parser.add_argument_group("measurement")
    measured.add_argument(
        "--measure", action="store_true", help="also run real steps and measure their memory"
    )
    measured.add_argument(
        "--scale",
        default="1",
        metavar="F",
        help="multiply the first dimension of each parameter by F, to measure a smaller model",
    )
    measured.add_argument(
        "--device", default="auto", help="device to measure on: auto (default), cpu or cuda"
    )
    measured.add_argument(
        "--snapshot",
        type=Path,
        metavar="DIR",
        help="write the memory history of the CUDA allocator into DIR",
    )

    advice = parser.add_argument_group("recommendation")
    advice.add_argument(
        "--recommend", action="store_true", help="recommend an optimizer; needs --gpu"
    )
    advice.add_argument(
        "--task", default="pretrain", help="pretrain (default), finetune, lora or qlora"
    )
    advice.add_argument(
        "--rank", default="16", metavar="R", help="rank of the LoRA adapters (default: 16)"
    )

    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print JSON instead of the table")
    out.add_argument("--csv", action="store_true", help="print CSV, in bytes, instead of the table")
    out.add_argument(
        "--plot", type=Path, metavar="FILE", help="write stacked bars as a png, svg or pdf file"
    )
    out.add_argument(
        "--html", type=Path, metavar="FILE", help="write the table and stacked bars as an HTML file"
    )
    out.add_argument(
        "--quiet", action="store_true", help="show no progress and do not name the files written"
    )


def run(args: argparse.Namespace) -> int:
    """Check the options, then predict, measure and print; return the exit code.

    Raises UsageError for an invalid option, an unknown name or a missing package.
    """
    from onepass_tools.memory import listing, runner

    if args.list_models or args.list_optimizers:
        return listing.run(args)
    if args.json and args.csv:
        raise UsageError("--json and --csv cannot be combined: choose one of them")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "missing packages: matplotlib; install them with pip install 'onepass[cli]'"
        )
    try:
        return runner.run(args)
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error
