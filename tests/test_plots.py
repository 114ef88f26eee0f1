"""Every figure is drawn from realistic data, saved, and checked for what it must show."""

import matplotlib
import numpy as np
import pytest

from openmm_regflow import metrics, plots, tfep
from openmm_regflow.errors import InputError

RNG = np.random.default_rng(0)


def torsions(n, share, seed=0):
    rng = np.random.default_rng(seed)
    right = rng.random(n) < share
    beta = rng.random(n) < 0.55
    phi = np.where(right, rng.vonmises(1.0, 20, n), rng.vonmises(np.where(beta, -2.4, -1.3), 10, n))
    psi = np.where(right, rng.vonmises(-0.5, 8, n), rng.vonmises(np.where(beta, 2.7, -0.4), 8, n))
    return phi, psi


def ramachandran():
    phi, psi = torsions(20_000, 0.1, 2)
    log_w = np.where(phi > 0, np.log(0.02 / 0.1), np.log(0.98 / 0.9))
    return plots.ramachandran({
        "reference (MD)": torsions(50_000, 0.02, 1), "flow": (phi, psi), "flow, reweighted": (phi, psi, log_w)
    }, title="Alanine dipeptide")  # fmt: skip


def energies():
    u = np.append(RNG.gamma(14, 1.9, 8000), [np.inf, 1e6])
    return plots.energies(RNG.gamma(20, 1.0, 10_000), u, np.where(u < 60, -0.2 * u, -np.inf))


def free_energy_profiles():
    return plots.free_energy_profiles({
        name: metrics.free_energy_profile(torsions(n, share, i)[0], n_resamples=50)
        for i, (name, n, share) in enumerate([("reference (MD)", 50_000, 0.02), ("flow", 8000, 0.08),
                                              ("flow, reweighted", 8000, 0.02)])
    })  # fmt: skip


def training_curves():
    steps = np.arange(1, 2001)
    curves = {name: (steps, 1 / steps**p + 0.003 * k) for name, p, k in (("training", 0.8, 1), ("held out", 0.7, 2))}
    return plots.training_curves({"regression": curves, "likelihood": curves})


def chains():
    stuck = RNG.vonmises(-1.4, 6, 4000)
    return plots.chains({"Langevin dynamics": stuck, "Langevin + flow moves": torsions(4000, 0.1, 3)[0]})


def works():
    return RNG.normal(3.1, 1.5, 1500), RNG.normal(-0.9, 1.5, 1500)


def convergence():
    return plots.convergence(tfep.convergence(*works(), n_resamples=20), exact=(2.0, 0.1), title="ΔF(φ>0) − ΔF(φ<0)")


FIGURES = {
    "ramachandran": ramachandran,
    "energies": energies,
    "weights": lambda: plots.weights(np.append(RNG.normal(0, 1.2, 10_000), -np.inf)),
    "free_energy_profiles": free_energy_profiles,
    "training_curves": training_curves,
    "chains": chains,
    "convergence": convergence,
    "work_distributions": lambda: plots.work_distributions(*works(), 2.0),
    "stacked": lambda: plots.stacked({"eager": {"flow": 30.0, "energies": 40.0},
                                      "compiled": {"flow": 20.0, "energies": 2.0}}, label="time [µs]"),
    "bars": lambda: plots.bars({"umbrella (published)": (4.10, 0.26), "tempering reference": (3.84, 0.17),
                                "flow, reweighted": (3.95, 0.08)}, ylabel="ΔF [kT]", band=(3.84, 4.36)),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_drawn_and_saved(name, tmp_path):
    before = dict(matplotlib.rcParams)
    figure = FIGURES[name]()
    path = plots.save(figure, tmp_path / "sub" / f"{name}.png")
    assert path.stat().st_size > 8000
    assert plots.to_png(figure)[:8] == b"\x89PNG\r\n\x1a\n"
    assert dict(matplotlib.rcParams) == before
    for axis in figure.axes:
        assert axis.get_xlabel() or axis.get_ylabel() or len(figure.axes) > 1


def test_panels_share_one_scale():
    figure = ramachandran()
    limits = {axis.collections[0].get_clim() for axis in figure.axes[:3]}
    assert len(limits) == 1
    assert all(axis.get_xlim() == (-180, 180) for axis in figure.axes[:3])


def test_samples_off_scale_are_written_out():
    figure = plots.energies(RNG.normal(0, 1, 1000), np.append(RNG.normal(0, 1, 900), np.full(100, 1e9)))
    assert any("10.0 %" in text.get_text() for text in figure.axes[0].texts)


def test_crossings_are_counted_in_the_title():
    figure = plots.chains({"chain": np.array([-1.0, 1.0, -1.0])})
    assert "2 crossings" in figure.axes[0].get_title(loc="left")


def test_chains_of_different_steps_share_the_time_axis():
    figure = plots.chains({"slow": np.ones(11), "fast": np.ones(101)}, time_step={"slow": 1.0, "fast": 0.1})
    assert [axis.lines[0].get_xdata()[-1] for axis in figure.axes] == pytest.approx([10.0, 10.0])


def test_unknown_format_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        plots.save(plots.weights(np.zeros(100)), tmp_path / "figure.xyz")


def test_all_infinite_flow_energies_still_draw():
    assert plots.energies(RNG.normal(0, 1, 100), np.full(50, np.inf)).axes
