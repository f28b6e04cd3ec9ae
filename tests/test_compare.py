"""`onepass compare`: its measurements on cases with a known answer, and the files it writes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from onepass_tools import EXIT_USAGE, main

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

from onepass.training import OPTIMIZERS
from onepass_tools.compare import (
    claims,
    line_fit,
    path_plots,
    report,
    runner,
    tasks,
    training_runs,
    verdicts,
)
from onepass_tools.compare.algorithms import ALGORITHMS, BY_KEY
from onepass_tools.compare.lr_sweep import decades, steps_to_target
from onepass_tools.compare.stats import interval
from onepass_tools.compare.surfaces import SURFACES, best_path, descend

from .support.thorough import THOROUGH, thorough

DOCS = Path(__file__).parents[1] / "docs" / "comparison"


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    torch.set_num_threads(1)


# --- the claims, one by one ------------------------------------------------------------------


@thorough
def test_momentum_oscillates_where_adamw_lands_at_the_same_rate():
    found = claims.oscillation()
    momentum, adamw = found["momentum"], found["adamw"]
    assert momentum["line crossings"] >= 5 > 2 >= adamw["line crossings"]
    assert momentum["line overshoot"] > 0.3 > 0.1 > adamw["line overshoot"]
    assert momentum["ravine crossings at lr 0.01"] > 10 > 2 >= adamw["ravine crossings at lr 0.01"]
    # At its own best learning rate AdamW oscillates too, contrary to a common claim.
    assert adamw["ravine crossings"] > 5


@thorough
def test_adagrads_steps_die_out_and_rmsprops_do_not():
    found = claims.step_decay()
    assert found["adagrad"] == pytest.approx(-0.5, abs=0.02)
    assert found["rmsprop"] == pytest.approx(0, abs=0.02)


def test_l2_in_adam_is_not_decoupled_decay():
    taken = claims.decay_kinds()
    # 200 steps that multiply the weight by 1 - 0.01 * 0.1
    exact = 1 - 0.999**200
    for size in ("0.1", "10"):
        assert taken[f"adamw, gradients of {size}"] == pytest.approx(exact, abs=2e-3)
    assert taken["adam, gradients of 0.1"] > 3 * exact
    assert taken["adam, gradients of 10"] < exact / 3


def test_lions_step_has_constant_size():
    assert claims.lion_steps() == (1.0, 1.0)


def test_clipping_tames_a_cliff():
    free, clipped = claims.cliff(None), claims.cliff(1.0)
    assert claims.furthest(free) > 10 * free[0]
    assert claims.furthest(clipped) < clipped[0]
    assert max(free[-1], clipped[-1]) < 1e-6


# --- measurements ---


@pytest.mark.parametrize(("low", "high"), [(0.5, 7.0), (-9.0, 4.0)])
def test_sharpness_is_the_largest_eigenvalue(low, high):
    """Also if the smallest eigenvalue has the largest magnitude."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    values = [*torch.linspace(low, 0.6 * high, 11).tolist(), high]
    hessian = basis @ torch.diag(torch.tensor(values)) @ basis.T
    a, b = (torch.nn.Parameter(torch.randn(6, generator=generator)) for _ in range(2))

    def loss():
        x = torch.cat([a, b])
        return 0.5 * x @ hessian @ x

    assert training_runs.sharpness(loss, [a, b], 200) == pytest.approx(high, rel=1e-4)


def test_sharpness_changes_nothing():
    task = tasks.cnn_task(1)
    model = task.model(0)
    before = [p.clone() for p in model.parameters()]
    assert math.isfinite(training_runs.sharpness_of(task, model))
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_intervals_use_students_t():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(interval([1.0])[1])


def test_a_verdict_needs_more_than_the_interval():
    assert verdicts.compare([1.0, 1.1, 0.9], [2.0, 2.1, 2.0]) == verdicts.HOLDS
    assert verdicts.compare([2.0, 2.1, 2.0], [1.0, 1.1, 0.9]) == verdicts.CONTRADICTED
    assert verdicts.compare([1.0, 2.0, 3.0], [1.5, 1.4, 3.3]) == verdicts.INCONCLUSIVE
    assert verdicts.compare([None, 1.0], [2.0, None]) == verdicts.INCONCLUSIVE


def test_two_seeds_decide_nothing():
    assert verdicts.compare([1.0, 1.0], [2.0, 2.0]) == verdicts.INCONCLUSIVE


def test_progress_is_lines_in_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr(runner.Progress, "SECONDS", 0.0)
    for quiet in (False, True):
        with runner.Progress(2, quiet) as progress:
            progress.update()
            progress.update()
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(", ")[0] for line in lines] == (
            [] if quiet else ["compare: 1 of 2 turns", "compare: 2 of 2 turns"]
        )


def test_decades_and_steps():
    assert decades([1.0, 0.5, 0.55, 2.0], [-1.0, -0.5, 0.0, 0.5]) == 1.0
    assert decades([math.inf, 0.5], [0.0, 0.5]) == 0.5
    assert steps_to_target([None, None]) == "not reached"
    assert steps_to_target([100, None]) == "100 (1 of 2 seeds)"


# --- surfaces and the line -------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.key)
def test_minima_are_minima_and_inside_the_picture(surface):
    left, right, bottom, top = surface.box
    for x, y in (*surface.minima, surface.start):
        assert left < x < right
        assert bottom < y < top
    for minimum in surface.minima:
        point = torch.tensor(minimum, dtype=torch.float64, requires_grad=True)
        value = surface.f(*point)
        (slope,) = torch.autograd.grad(value, point)
        assert float(value.detach()) == pytest.approx(surface.lowest, abs=1e-9)
        assert slope.abs().max() < 1e-4
    assert surface.f(*surface.start) > surface.lowest


@pytest.mark.parametrize("number", range(len(ALGORITHMS)), ids=BY_KEY)
def test_every_algorithm_descends_every_surface(number):
    """`make test` runs each algorithm on one surface, and each surface at least once."""
    algorithm, some = ALGORITHMS[number], SURFACES[number % len(SURFACES) :][:1]
    assert algorithm.name in OPTIMIZERS
    for surface in SURFACES if THOROUGH else some:
        path = best_path(surface, algorithm, 100)
        assert path.losses[-1] < 0.3 * path.losses[0], surface.key


def test_learning_rates_run_independently():
    noisy = SURFACES[-1]
    together = descend(noisy, "adamw", [0.01, 0.3], 20)
    alone = descend(noisy, "adamw", [0.3], 20)
    assert np.array_equal(together[1], alone[0])
    # The noise changes the path.
    assert not np.array_equal(alone, descend(SURFACES[0], "adamw", [0.3], 20))


def test_all_start_at_the_same_line_and_all_but_two_fit_it():
    found = line_fit.run_algorithms()
    assert len({run["loss"][0] for run in found["runs"].values()}) == 1
    assert found["exact"] == pytest.approx([2, 1], abs=0.05)
    for key, run in found["runs"].items():
        # At this learning rate, the step size of Adagrad has decayed too soon, and the average of
        # the schedule-free weights contains the first ones.
        fits = key not in ("adagrad", "adamwschedulefree")
        assert (run["loss"][-1] < 1.1 * found["floor"]) == fits, key


@thorough
def test_smaller_batches_need_fewer_samples_and_are_noisier():
    batch, mini, stochastic = line_fit.run_batches().values()
    assert batch["samples"][1] == 100
    assert stochastic["samples"][1] == 1
    assert batch["loss"][-1] > 10 * mini["loss"][-1]
    at_100 = [run["loss"][run["samples"].index(100)] for run in (batch, mini, stochastic)]
    assert at_100 == sorted(at_100, reverse=True)
    assert np.std(stochastic["loss"][-50:]) > 10 * np.std(mini["loss"][-5:])


# --- the tasks -------------------------------------------------------------------------------


def test_tasks_depend_on_their_seed_alone():
    for task in (tasks.cnn_task(30), tasks.transformer_task(30)):
        runs = [training_runs.train(task, BY_KEY["adamw"], 0.01, seed) for seed in (0, 0, 1)]
        assert runs[0].curve == runs[1].curve
        assert runs[0].curve[0] != runs[2].curve[0]
        assert runs[0].curve[-1] < 0.9 * runs[0].curve[0]
        assert runs[0].state_bytes == pytest.approx(8, abs=0.1)


def test_a_diverged_run_has_no_result():
    result = training_runs.train(tasks.cnn_task(30), BY_KEY["sgd"], 1e8, 0, max_grad_norm=None)
    assert math.isnan(result.train)
    assert len(result.curve) < 30


# --- files ---


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A comparison of minimal size; its figures mean nothing."""
    out = tmp_path_factory.mktemp("compare")
    patch = pytest.MonkeyPatch()
    patch.setattr(path_plots, "FRAMES", 3)
    patch.setattr(training_runs, "ITERATIONS", 2)
    size = runner.Size(12, [0.0], 1, 2, path_steps=15)
    with runner.one_thread():
        runner.compare(out, size, size.seeds, "a test", True)
    patch.undo()
    return out


@thorough
def test_every_plot_exists_and_is_linked(written):
    page = (written / "comparison.md").read_text()
    names = {path.name for path in written.iterdir()}
    assert names >= {"line.png", "batches.png", "models.png", "paths.png", *path_plots.files()}
    for name in ("line.png", "batches.png", "models.png", "paths.png"):
        assert f"]({name})" in page
        assert (written / name).read_bytes().startswith(b"\x89PNG")
    from PIL import Image

    with Image.open(written / "paths.gif") as animation:
        assert animation.n_frames >= 3


@thorough
def test_every_algorithm_is_in_every_table(written):
    page = (written / "comparison.md").read_text()
    for algorithm in ALGORITHMS:
        assert page.count(f"\n| {algorithm.label} |") == 3
    assert not re.search(r"\bnan\b", page)


@pytest.mark.parametrize("folder", [DOCS], ids=["docs"])
def test_the_docs_page_matches_its_json(folder):
    results = json.loads((folder / "comparison.json").read_text())
    assert (folder / "comparison.md").read_text() == report.markdown(results)
    assert results["about"]["command"] == "onepass compare"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1"], "--seeds must be at least 2, to compute confidence intervals; got 1"),
        (["--out", "/dev/null/x"], "--out /dev/null/x cannot be written"),
    ],
)
def test_wrong_options(options, message, capsys):
    assert main(["compare", *options]) == EXIT_USAGE
    assert message in capsys.readouterr().err
