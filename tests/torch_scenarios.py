"""Scenarios that run with a class of torch.optim and with onepass's class of the same name.

A scenario takes the class and returns plain values. Both classes must return the same values and
give warnings of the same categories.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import onepass

NAMES = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")


class Scenarios:
    """The scenarios of a test file, in order."""

    def __init__(self):
        self.runs = []

    def __call__(self, run):
        """Decorator that adds a scenario."""
        self.runs.append(run)
        return run

    def test(self):
        """Makes a test function that runs all scenarios with all classes."""

        @pytest.mark.parametrize("name", NAMES)
        @pytest.mark.parametrize("run", self.runs, ids=lambda run: run.__name__)
        def test_both_classes_do_the_same(run, name):
            theirs = outcome(run, getattr(torch.optim, name))
            assert outcome(run, getattr(onepass, name)) == theirs

        return test_both_classes_do_the_same


def outcome(run, make):
    """The result of a scenario and the categories of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(make)
    return result, [w.category for w in caught]


def errors_of(calls):
    """The type of the exception that each call raises, or None."""
    found = []
    for call in calls:
        try:
            call()
            found.append(None)
        except Exception as error:
            found.append(type(error))
    return found


def param(start=0.0):
    """A parameter of four elements."""
    return torch.nn.Parameter(torch.arange(4.0) + start)


def steps(optimizer, count=2):
    """Takes steps with gradients that depend on the parameter's index; returns the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(count):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 1.0 + i)
        optimizer.step()
    return params


def rounded(params):
    """Weights rounded to four digits, because the last bits of the two libraries differ."""
    return [[round(x, 4) for x in p.flatten().tolist()] for p in params]
