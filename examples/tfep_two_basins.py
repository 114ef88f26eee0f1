"""Free energy of one basin above another by targeted free energy perturbation, beside the exact value.

A skewed double well with a barrier that plain perturbation cannot cross (the two basins do not overlap at all). Three
maps carry the left basin onto the right one: a Gaussian optimal-transport map, the same with cross-fitting so that no
sample is wasted, and a normalizing flow trained by regression on optimal-transport pairs. Run it with

    python examples/tfep_two_basins.py [output folder]

It takes about a minute on one core and writes two plots.
"""

import sys
from pathlib import Path

import torch

from openmm_regflow import plots, tfep
from openmm_regflow.coordinates import CartesianMap
from openmm_regflow.toys import skewed_double_well
from openmm_regflow.training import TrainConfig

output = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tfep_two_basins")

# Samples of both basins. Their numbers differ tenfold; only configurations count, not how often a basin was visited.
well = skewed_double_well(barrier=15.0, skew=3.0)
x = well.sample(12_000, torch.Generator().manual_seed(1))
is_left = x[:, 0, 0] <= 0
left, right = x[is_left], x[~is_left]
print(f"{len(left)} samples left, {len(right)} right; exact delta_f = {well.delta_f():.3f} kT\n")

# The states: one potential, two basins. Any callable from positions [nm] to energies [kJ/mol] will do.
a = tfep.State(well.energy, well.temperature, lambda x: x[:, 0, 0] <= 0)
b = tfep.State(well.energy, well.temperature, lambda x: x[:, 0, 0] > 0)

# Maps are trained on the first half of each set and evaluated on the second.
(left_train, left_test), (right_train, right_test) = tfep.split(left), tfep.split(right)
trained_on = (left_train, right_train)

affine = tfep.AffineMap.fit(left_train, right_train)
result = tfep.free_energy_difference(affine, a, b, left_test, right_test, trained_on=trained_on)
print("affine map   ", result)
print("identity map ", result.plain or "no overlap at all: plain perturbation cannot answer")

crossed = tfep.cross_fit(tfep.AffineMap.fit, a, b, left, right, folds=5)
print("cross-fitted ", crossed)

learned = tfep.fit_map(
    CartesianMap(1, scale=0.05),
    left_train,
    right_train,
    n_layers=4,
    hidden=32,
    max_pairs=1500,
    config=TrainConfig(steps=600, batch_size=256, learning_rate=3e-3),
)
result = tfep.free_energy_difference(learned, a, b, left_test, right_test, trained_on=trained_on)
print("regression   ", result)

works = tfep.works(learned, a, b, left_test, right_test)
figure = plots.work_distributions(works.forward, works.reverse, result.delta_f, title="Works of the learned map")
print("\n", plots.save(figure, output / "works.png"))
table = tfep.convergence(works.forward, works.reverse)
figure = plots.convergence(table, exact=(well.delta_f(), 0.0), title="Right basin above the left one")
print("", plots.save(figure, output / "convergence.png"))
