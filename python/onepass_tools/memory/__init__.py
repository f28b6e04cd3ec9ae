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

Sizes are in powers of 1000 (24GB) or 1024 (24GiB). Activations are not counted: what is left of a
GPU is what there is for them. Exit codes: 0 done; 1 a measurement of ours is more than 0.5 % off
its prediction, or --recommend finds nothing that fits; 2 wrong usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `onepass memory`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    what = parser.add_argument_group("what")
    what.add_argument(
        "--model",
        help="a name of --list-models, a transformers config.json or its folder, owner/name in the "
        "cache of Hugging Face's hub, or module:factory",
    )
    what.add_argument(
        "--optimizers",
        metavar="LIST",
        help="separated by commas: a class in small letters, with options after a plus "
        f"(adamw+mx8+split8), a peer, or module:factory (default: {OPTIMIZERS})",
    )
    what.add_argument("--peers", action="store_true", help="other libraries' optimizers as well")
    what.add_argument("--list-models", action="store_true", help="names, parameters and sources")
    what.add_argument("--list-optimizers", action="store_true", help="ours, options and peers")

    run = parser.add_argument_group("the run")
    run.add_argument("--dtype", default="bf16", help="of the weights: fp32, bf16 (default), fp16")
    run.add_argument("--grad-dtype", help="of the gradients (default: the weights')")
    run.add_argument(
        "--parameter-groups",
        action="store_true",
        help="norms in fp32, and fp32 states for embeddings and norms, as onepass.cast_model and "
        "onepass.parameter_groups leave them",
    )
    run.add_argument("--gpu", metavar="SIZE", help="what has to hold it, such as 24GB")
    run.add_argument("--reserve", metavar="SIZE", help="of it, to be left for activations")
    run.add_argument("--shards", default="1", metavar="N", help="GPUs that share it (default: 1)")
    run.add_argument(
        "--sharding", default="fsdp2", help="how: fsdp2 (default), all of it; zero1, the states"
    )

    measured = parser.add_argument_group("measuring")
    measured.add_argument("--measure", action="store_true", help="also take real steps and count")
    measured.add_argument(
        "--scale", default="1", metavar="F", help="first dimensions times F, to measure on less"
    )
    measured.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    measured.add_argument(
        "--snapshot", type=Path, metavar="DIR", help="write the CUDA allocator's history here"
    )

    advice = parser.add_argument_group("advice")
    advice.add_argument("--recommend", action="store_true", help="which to take; needs --gpu")
    advice.add_argument("--task", default="pretrain", help="pretrain, finetune, lora or qlora")
    advice.add_argument("--rank", default="16", metavar="R", help="of the adapters (default: 16)")

    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="JSON instead of the table")
    out.add_argument("--csv", action="store_true", help="CSV, in bytes, instead of the table")
    out.add_argument("--plot", type=Path, metavar="FILE", help="stacked bars: png, svg or pdf")
    out.add_argument("--html", type=Path, metavar="FILE", help="bars and table to point at")
    out.add_argument("--quiet", action="store_true", help="no progress, no files named")


def run(args: argparse.Namespace) -> int:
    """Check the options, then predict, measure and print; return the exit code.

    Raises UsageError for an invalid option, an unknown name or a missing package.
    """
    from onepass_tools.memory import listing, runner

    if args.list_models or args.list_optimizers:
        return listing.run(args)
    if args.json and args.csv:
        raise UsageError("--json and --csv are two outputs: one of them is accepted")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("matplotlib not installed: pip install 'onepass[cli]'")
    try:
        return runner.run(args)
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error
