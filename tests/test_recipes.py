"""The whole training path on a small budget, its configuration file, its resumption."""

import json

import numpy as np
import pytest
import tomlkit
import torch
from analytic_molecules import TEMPERATURE, Well
from pydantic import ValidationError

from openmm_regflow import flows, products, recipes, reweighting, teachers
from openmm_regflow.errors import CorruptFileError, IncompatibleFlowError, InputError
from openmm_regflow.flows import FlowMetadata
from openmm_regflow.objectives import LikelihoodLoss
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.proposals import FlowProposal
from openmm_regflow.recipes import RunConfig
from openmm_regflow.systems import load_system
from openmm_regflow.targets import reflow_pairs
from openmm_regflow.teachers import ADAPTIVE, FIXED, VectorField
from openmm_regflow.units import thermal_energy


def config(**changes):
    short = {"steps": 30, "batch_size": 64, "checkpoint_every": 10, "warmup": 5}
    base = {
        "flow": {"n_layers": 2, "hidden": 16},
        "teacher": {"hidden": 16, "depth": 1, "train": short},
        "pairs": {"n": 256, "n_steps": 2},
        "regression": {"train": short},
        "likelihood": {"train": short},
    }
    return RunConfig.model_validate(base | changes)


@pytest.fixture(scope="module")
def data():
    mol = load_system("alanine-dipeptide")
    g = torch.Generator().manual_seed(0)
    x = torch.as_tensor(mol.positions) + 0.003 * torch.randn(500, 22, 3, generator=g, dtype=torch.float64)
    return mol.topology, x[:400], x[400:]


@pytest.mark.parametrize("coordinates", ["internal", "cartesian"])
@pytest.mark.parametrize("name", ["real_nvp", "res_nvp", "spline", "jet"])
def test_every_architecture_trains(data, coordinates, name):
    result = recipes.fit(*data, config(coordinates=coordinates, flow={"name": name, "n_layers": 2, "hidden": 16}))
    assert set(result.histories) == {"teacher", "regression", "likelihood"}
    x, log_q = result.flow.sample(10, torch.Generator().manual_seed(0))
    assert x.shape == (10, 22, 3) and torch.isfinite(log_q).any()


CARTESIAN = {"coordinates": "cartesian", "flow": {"n_layers": 2, "hidden": 16, "prior": "harmonic"}}


@pytest.mark.parametrize(
    "changes",
    [
        {"pairs": {"source": "ot", "n": 200}},
        {"pairs": {"source": "hierarchical", "n": 200}},
        {"objective": "mle"},
        CARTESIAN | {"pairs": {"source": "ot", "n": 100, "align": True}},
    ],
    ids=["ot", "hierarchical", "mle", "aligned"],
)
def test_other_sources(data, changes):
    result = recipes.fit(*data, config(**changes))
    assert result.field is None and "likelihood" in result.histories
    assert result.flow.prior.kind == changes.get("flow", {}).get("prior", "normal")


def test_streamed_pairs(data, tmp_path):
    """A stream makes no folder of pairs, and its teacher's log-determinant is a target like any other."""
    pairs = {"source": "stream", "n_steps": 2, "log_det": "hutchinson"}
    regression = {"log_det": 1e-3, "train": config().regression.train.model_dump()}
    result = recipes.fit(*data, config(pairs=pairs, regression=regression), folder=tmp_path)
    assert result.histories["regression"].step[-1] == 30 and not (tmp_path / "pairs").exists()


def test_regression_is_judged_by_pairs_that_it_does_not_see(data):
    train = config().regression.train.model_dump() | {"validate_every": 10, "patience": 1, "learning_rate": 1e-9}
    result = recipes.fit(*data, config(regression={"held_out": 0.25, "train": train}))
    history = result.histories["regression"]
    assert history.validation_step == sorted(set(history.validation_step)) and len(history.validation) >= 2
    assert history.stopped in ("patience", "steps")
    with pytest.raises(InputError, match="held_out"):
        recipes.fit(*data, config(regression={"train": train}))
    with pytest.raises(InputError, match=r"63 samples .* regression"):
        recipes.fit(*data, config(regression={"held_out": 0.25}, pairs={"n": 84}, likelihood={"train": train}))


def test_validation_in_parts(data):
    """What is held out passes through the flow in parts, and its loss is that of all of it together."""
    topology, x, _ = data
    held_out = x.repeat(13, 1, 1) + 0.003 * torch.randn(5200, 22, 3, generator=torch.Generator().manual_seed(1))
    train = {"steps": 2, "batch_size": 64, "validate_every": 1}
    changes = {"pairs": {"n": 6000, "n_steps": 1}, "regression": {"held_out": 0.5, "train": train}}
    stages, rows = [], {}

    def count(module, inputs):
        rows[stages[-1]] = max([rows.get(stages[-1], 0), *inputs[0].shape[:1]])

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        result = recipes.fit(
            topology, x, held_out, config(**changes, likelihood={"train": train}),
            stage=lambda name, total: (stages.append(name), lambda *_: None)[1],
        )  # fmt: skip
    finally:
        hook.remove()
    assert 1000 <= rows["regression"] <= 2048 and 1000 <= rows["likelihood"] <= 2048
    y = recipes.features(result.flow.coordinates, held_out, torch.Generator())
    whole = LikelihoodLoss(result.flow.prior).of(result.flow.bijection, (y,))[0]
    # The weights that validated best; a mean of 5200 float32 terms.
    assert min(result.histories["likelihood"].validation) == pytest.approx(whole.item(), rel=1e-5)


def test_equivariant_teacher_with_a_harmonic_prior(data, tmp_path):
    short = {"steps": 4, "batch_size": 16}
    teacher = {"kind": "equivariant", "hidden": 4, "depth": 1, "train": short}
    result = recipes.fit(*data, config(**CARTESIAN, teacher=teacher, pairs={"n": 64, "n_steps": 1}))
    teachers.save_teacher(tmp_path / "t.safetensors", result.field)
    again = teachers.load_teacher(tmp_path / "t.safetensors")
    assert again.prior.kind == "harmonic" and torch.equal(again.prior.factor, result.field.prior.factor)


@pytest.mark.parametrize(
    "changes",
    [
        {"flow": {"prior": "harmonic"}},
        {"teacher": {"kind": "equivariant"}},
        {"teacher": {"align": True}},
        {"pairs": {"align": True, "source": "ot"}},
    ],
)
def test_choices_for_atoms_need_cartesian_coordinates(data, changes):
    with pytest.raises(InputError, match='coordinates = "cartesian"'):
        recipes.fit(*data, config(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pairs": {"source": "stream"}, "regression": {"held_out": 0.3}}, "held_out"),
        ({"pairs": {"source": "ot", "log_det": "exact"}}, r"pairs\.log_det"),
        ({"pairs": {"source": "hierarchical", "log_det": "hutchinson"}}, "towards zero"),
        ({"likelihood": {"path": 0.5, "noise": 0.1}}, "moves frames"),
        ({"pairs": {"log_det": "exact"}}, "used by nothing"),
        ({"pairs": {"source": "ot"}, "teacher": {"couple": True}}, "need none"),
        ({"objective": "mle", "likelihood": {"enabled": False}}, "likelihood phase alone"),
        ({"objective": "mle", "pairs": {"folder": "pairs"}}, "has no pairs"),
        ({"regression": {"held_out": 0.001}, "pairs": {"n": 500}}, "is none"),
    ],
)
def test_settings_without_effect_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        recipes.check_config(config(**changes))
    recipes.check_config(config(pairs={"source": "ot"}, regression={"log_det": 1e-3}))  # the paper's own regulariser


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flow": {"name": "res_nvp", "n_bins": 4}}, "n_bins"),
        ({"flow": {"torsion_layers": 1}}, "half of the torsions"),
        ({"flow": {"n_layers": 1}}, "greater than or equal to 2"),
        ({"flow": {"torsion_layers": 0, "torsion_hidden": 8}}, "torsion_hidden"),
        ({"flow": {"line_bins": 1}}, "changes nothing"),
        ({"refinement": {"anchors": 0, "anchor_moves": 1}}, "anchor_moves"),
        ({"refinement": {"tail_after": 0.5}}, "tail_after"),
    ],
)
def test_sections_whose_settings_do_nothing_are_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        recipes.RunConfig.model_validate(changes)


def test_a_few_frames_with_other_labels_are_left_out(data):
    """One of them would outweigh the others in every validation; half of them are another numbering."""
    topology, x, held_out = data
    rotor = flows.coordinates_for(topology, x).rotors[0].atoms
    settings = config(objective="mle")
    plain = recipes.fit(topology, x, held_out, settings).histories["likelihood"].validation
    swapped = torch.as_tensor(held_out).clone()
    for some, words in ((5, "5 of"), (len(swapped), "numbered the other way round")):
        swapped[:some] = torch.as_tensor(held_out)[:some]
        swapped[:some, list(rotor[:2])] = swapped[:some, [rotor[1], rotor[0]]]
        if some > 5:
            with pytest.raises(InputError, match=words):
                recipes.fit(topology, x, swapped, settings)
            continue
        with pytest.warns(RuntimeWarning, match=words):
            found = recipes.fit(topology, x, swapped, settings).histories["likelihood"].validation
        assert np.abs(np.array(found) - np.array(plain)).max() < 2.0  # with them it was off by hundreds


def test_alignment_needs_exact_transport(data):
    with pytest.raises(InputError, match=r"pairs\.source"):
        recipes.fit(*data, config(coordinates="cartesian", pairs={"align": True}))


def test_interrupted_fit_continues(data, tmp_path):
    straight = recipes.fit(*data, config())

    class Killed(Exception):
        pass

    def stage(name, total):
        def progress(step, total, figures):
            if name == "regression" and step == 17:
                raise Killed

        return progress

    with pytest.raises(Killed):
        recipes.fit(*data, config(), folder=tmp_path, stage=stage)
    resumed = recipes.fit(*data, config(), folder=tmp_path)
    assert resumed.histories["regression"].loss == straight.histories["regression"].loss
    pairs = zip(straight.flow.state_dict().values(), resumed.flow.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(IncompatibleFlowError, match="another configuration"):
        recipes.fit(*data, config(objective="mle"), folder=tmp_path)


BAD = {
    "teacher batch": ({"teacher": {"train": {"batch_size": 401}}}, lambda x: x, "400 samples .* teacher"),
    "pairs batch": ({"pairs": {"n": 63}}, lambda x: x, "63 samples .* regression"),
    "likelihood batch": ({"likelihood": {"train": {"batch_size": 500}}}, lambda x: x, "400 samples .* likelihood"),
    "transport batch": ({"pairs": {"source": "ot", "n": 50}}, lambda x: x, "50 samples .* regression"),
    "precision": ({"regression": {"train": {"precision": "bfloat16"}}}, lambda x: x, "inverse"),
    "shape": ({}, lambda x: x[:, :, 0], r"\(400, 22\)"),
    "one-dimensional": ({}, lambda x: x[:, 0, 0], r"\(400,\); \(n, n_atoms, 3\)"),
    "empty": ({}, lambda x: x[:0], r"\(0, 22, 3\)"),
    "nan": ({}, lambda x: torch.where(torch.arange(400)[:, None, None] == 7, torch.nan, x), "training frame 7"),
}


@pytest.mark.parametrize("coordinates", ["internal", "cartesian"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_training(data, coordinates, name, tmp_path):
    changes, spoil, words = BAD[name]
    heard = []
    with pytest.raises(InputError, match=words):
        recipes.fit(
            data[0],
            spoil(data[1]),
            data[2],
            config(coordinates=coordinates, **changes),
            folder=tmp_path / "work",
            stage=lambda stage, total: heard.append(stage),
        )
    assert not heard and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"refinement": {"enabled": True, "rare_share": 0.2}}, "watched sets"),
        ({"frames": {"rare_share": 0.09}, "teacher": {"train": {"batch_size": 300}}}, "fewer than one batch"),
        ({"frames": {"rare_share": 0.3}}, "validation frames"),
        ({"pairs": {"source": "ot", "n": 30_000}, "frames": {"copies": 100}}, "hierarchical"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_first(data, changes, words, tmp_path):
    """Nothing is computed, and the folder is free for the mended configuration."""
    topology, x, held_out = data
    watch = [lambda x: torch.arange(len(x)) % 20 == 0] if "frames" in changes else None
    settings = config(**changes)
    potential = {"reduced_potential": lambda x: x.sum((1, 2)), "mover": lambda x, generator: (x, 0)}
    with pytest.raises(InputError, match=words):
        recipes.fit(topology, x, held_out, settings, folder=tmp_path, watch=watch, **potential)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"pairs": {"folder": "/nowhere"}}, InputError),
        ({"pairs": {"folder": "of another", "n": 64}}, IncompatibleFlowError),
        ({"teacher": {"kind": "transformer", "hidden": 18}}, InputError),
    ],
)
def test_what_does_not_fit_is_refused_before_frames_are_made(data, changes, error, tmp_path):
    """They take energies, and their folder belongs to one configuration."""
    if changes.get("pairs", {}).get("folder") == "of another":
        reflow_pairs(VectorField(torch.zeros(3, dtype=torch.bool), hidden=8), 64, n_steps=1, folder=tmp_path / "p")
        changes = {"pairs": changes["pairs"] | {"folder": str(tmp_path / "p")}}

    def must_not_move(x, generator):
        raise AssertionError("energies were spent")

    settings = config(frames={"copies": 3}, **changes)
    with pytest.raises(error):
        recipes.fit(*data, settings, mover=must_not_move, folder=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_frames_in_one_place_are_named(data):
    x = data[1].clone()
    x[5] = 0.0
    with pytest.raises(InputError, match="frame 5 has no internal coordinates"):
        recipes.fit(data[0], x, data[2], config())


def test_arrays_do_as_well_as_tensors(data):
    topology, x, held_out = data
    kinds = ((x, held_out), (x.numpy(), held_out.numpy()))
    found = [recipes.fit(topology, *frames, config(objective="mle")) for frames in kinds]
    assert found[0].histories["likelihood"].loss == found[1].histories["likelihood"].loss


def test_infinite_settings_are_printed_as_toml(tmp_path):
    settings = config(likelihood={"train": {"clip": float("inf")}})
    (tmp_path / "a.toml").write_text(recipes.print_config(settings))
    assert recipes.load_config(tmp_path / "a.toml") == settings


def test_bad_validation_frames(data):
    with pytest.raises(InputError, match="validation frames"):
        recipes.fit(*data[:2], data[2][:, :21], config())


def test_teacher_in_mixed_precision(data):
    train = config().teacher.train.model_dump() | {"precision": "bfloat16", "steps": 60, "batch_size": 64}
    half = recipes.fit(*data, config(teacher={"hidden": 16, "depth": 1, "train": train})).histories["teacher"]
    train["precision"] = "float32"
    full = recipes.fit(*data, config(teacher={"hidden": 16, "depth": 1, "train": train})).histories["teacher"]
    # Eight bits of mantissa: a per cent, and another curve.
    assert half.loss == pytest.approx(full.loss, rel=0.03) and half.loss != full.loss


def test_students_by_coarse_gradients(data, monkeypatch):
    """Regression and likelihood follow the curve of float32 to a per cent, and the flow is as exact both ways."""
    if products.rounding() is None:  # as on other processors
        monkeypatch.setattr(products, "onednn_is_quicker", lambda: True)
        able = torch.cpu._is_avx512_bf16_supported()
        monkeypatch.setattr(products, "rounding", lambda: "oneDNN" if able else None)
    monkeypatch.setattr(products, "LEAST_WORK", 1)
    found = []
    for precision in ("float32", "mixed"):
        train = {"precision": precision, "steps": 60, "batch_size": 64}
        changes = {"regression": {"train": train}, "likelihood": {"train": train}}
        found.append(recipes.fit(*data, config(**changes)))
    full, mixed = found
    for stage in ("regression", "likelihood"):
        assert mixed.histories[stage].loss == pytest.approx(full.histories[stage].loss, rel=0.02, abs=0.05)
    assert mixed.histories["regression"].loss[-1] < 0.9 * mixed.histories["regression"].loss[0]
    if products.rounding():
        assert mixed.histories["likelihood"].loss != full.histories["likelihood"].loss
    assert mixed.inverse_error < 1e-4


def test_refinement_needs_a_potential(data):
    changes = {"refinement": {"enabled": True, "rounds": 1, "pool": 1000, "batch_size": 100}}
    with pytest.raises(InputError, match="reduced_potential"):
        recipes.fit(*data, config(**changes))
    mol = load_system("alanine-dipeptide")
    potential = TorchPotential(mol.system)
    result = recipes.fit(*data, config(**changes), reduced_potential=lambda x: potential(x) / 2.49)
    anchors = 400  # all the training frames, evaluated once
    assert [r.energies for r in result.rounds] == [anchors + 1000, anchors + 2000] and "refinement" in result.phases


def test_more_frames_are_trained_on_and_their_energies_counted(data, tmp_path):
    few = {"frames": {"copies": 3}, "likelihood": {"enabled": False}}
    with pytest.raises(InputError, match="no kernel was given"):
        recipes.fit(*data, config(**few))
    calls = []

    def mover(x, generator):
        calls.append(len(x))
        return x + 0.001 * torch.randn(x.shape, generator=generator, dtype=x.dtype), 7 * len(x)

    first = recipes.fit(*data, config(**few), mover=mover, folder=tmp_path)
    assert calls == [400] * 4 and first.costs()["frame energies"] == first.costs()["energies"] == 4 * 7 * 400
    again = recipes.fit(*data, config(**few), mover=mover, folder=tmp_path)
    assert len(calls) == 4 and again.costs()["energies"] == first.costs()["energies"]  # read, not made again
    plain = recipes.fit(*data, config(likelihood={"enabled": False}))
    assert plain.histories["teacher"].loss != first.histories["teacher"].loss
    wide = config(frames={"copies": 3}, objective="mle", likelihood={"train": {"steps": 2, "batch_size": 1000}})
    recipes.fit(*data, wide, mover=mover)  # a batch larger than the trajectory, not than its copies


def test_a_share_for_rare_frames(data):
    """A flow of the frames with the lifted share has it, too; nothing is trained if nobody says what is rare."""
    topology, x, held_out = data
    g = torch.Generator().manual_seed(1)
    many = (some.repeat(10, 1, 1) for some in (x, held_out))
    x, held_out = (some + 0.003 * torch.randn(some.shape, generator=g) for some in many)
    short = {"steps": 200, "batch_size": 64, "warmup": 5, "learning_rate": 1e-2, "ema": 0.9, "validate_every": 50}
    settings = {"objective": "mle", "likelihood": {"train": short}}
    limit = (x[:, 4] - x[:, 8]).norm(dim=-1).quantile(0.9)

    def rare(x):
        return (x[:, 4] - x[:, 8]).norm(dim=-1) > limit

    with pytest.raises(InputError, match="watched sets"):
        recipes.fit(topology, x, held_out, config(frames={"rare_share": 0.5}))
    found = {}
    for share in (0.0, 0.6):
        result = recipes.fit(topology, x, held_out, config(frames={"rare_share": share}, **settings), watch=[rare])
        positions, _ = result.flow.sample(4000, torch.Generator().manual_seed(0))
        found[share] = float(rare(positions).double().mean())
    assert found[0.0] < 0.2 and found[0.6] > 0.35


@pytest.mark.parametrize("name", ["couple", "align"])
def test_coupled_batches_of_the_teacher(data, name):
    """Shorter paths from the first batch on: the velocities that the teacher starts from have less variance."""
    cartesian = {"coordinates": "cartesian", "objective": "regflow", "pairs": {"n": 64, "n_steps": 1}}
    short = {"steps": 20, "batch_size": 64}
    plain, coupled = (
        recipes.fit(*data, config(**cartesian, teacher={"hidden": 8, "depth": 1, "train": short} | extra))
        for extra in ({}, {name: True})
    )
    assert coupled.histories["teacher"].loss[0] < 0.95 * plain.histories["teacher"].loss[0]


def test_one_coupling_at_a_time(data):
    with pytest.raises(InputError, match="choose one"):
        recipes.fit(*data, config(coordinates="cartesian", teacher={"couple": True, "align": True}))


LOSSES = {
    "likelihood.noise": ("likelihood", "likelihood", {"noise": 0.3}),
    "regression.target_noise": ("regression", "regression", {"target_noise": 0.5}),
    "regression.log_det": ("regression", "regression", {"log_det": 1.0}),
    "regression.forward_backward": ("regression", "regression", {"forward_backward": 1e9}),
}


@pytest.mark.parametrize("key", LOSSES)
def test_settings_reach_their_loss(data, key):
    """A setting that was left out on the way would leave the curve of its stage as it is."""
    section, stage, setting = LOSSES[key]
    train = config().regression.train.model_dump()
    plain, other = (recipes.fit(*data, config(**{section: {"train": train} | extra})) for extra in ({}, setting))
    assert other.histories["teacher"].loss == plain.histories["teacher"].loss
    assert other.histories[stage].loss[0] != pytest.approx(plain.histories[stage].loss[0], rel=1e-3)


def test_log_determinants_of_pairs_are_the_target(data):
    """The regression is pulled towards the teacher's log-determinants, not towards zero."""
    train = config().regression.train.model_dump()
    curves = []
    for kind in ("none", "exact"):
        settings = config(pairs={"n": 256, "n_steps": 2, "log_det": kind}, regression={"log_det": 1e-2, "train": train})
        curves.append(recipes.fit(*data, settings).histories["regression"].loss)
    assert curves[0] != curves[1]


def test_pairs_from_a_folder(data, tmp_path):
    """Made apart by the teacher of an earlier run: the same flow as in one go, and no teacher; other pairs refused."""
    metadata = FlowMetadata("a", {"sha256": "1"}, 300.0)
    whole = recipes.fit(*data, config(), metadata=metadata)
    teachers.save_teacher(tmp_path / "t.safetensors", whole.field)
    teacher = teachers.load_teacher(tmp_path / "t.safetensors")
    assert teacher.origin == flows.origin(whole.flow)
    assert set(teacher.origin) == {"name", "system", "coordinates", "prior"}
    reflow_pairs(teacher, 256, seed=1, n_steps=2, folder=tmp_path / "pairs")
    given = config(pairs={"n": 256, "folder": str(tmp_path / "pairs")})
    parted = recipes.fit(*data, given, metadata=metadata)
    assert set(parted.histories) == {"regression", "likelihood"} and parted.field is None
    assert parted.histories["regression"].loss == whole.histories["regression"].loss
    topology, x, held_out = data
    other = FlowMetadata("b", {"sha256": "2"}, 300.0)
    for frames, about, word in ((x, other, r"another system \(a\)"), (1.01 * x, metadata, "another coordinates")):
        with pytest.raises(IncompatibleFlowError, match=word):
            recipes.fit(topology, frames, held_out, given, metadata=about)
    heard = []
    for changes, words in (
        ({"folder": str(tmp_path / "none")}, "manifest"),
        ({"folder": str(tmp_path / "pairs"), "n": 300}, "holds 256 pairs, 300 are wanted"),
        ({"folder": str(tmp_path / "pairs"), "n": 256, "log_det": "exact"}, "without log-determinants"),
        ({"folder": str(tmp_path / "pairs"), "source": "stream"}, "pairs.source"),
    ):
        with pytest.raises(InputError, match=words):
            recipes.fit(*data, config(pairs=changes), stage=lambda name, total: heard.append(name))
    assert not heard
    recipes.fit(*data, given, metadata=metadata, folder=tmp_path / "run")
    for path in (tmp_path / "pairs").iterdir():
        path.unlink()
    reflow_pairs(teacher, 256, seed=2, n_steps=2, folder=tmp_path / "pairs")
    with pytest.raises(IncompatibleFlowError, match="differs in its pairs"):
        recipes.fit(*data, given, metadata=metadata, folder=tmp_path / "run")


def test_the_same_fit_has_the_same_origin(data):
    """To six digits: what another order of summation changes does not count, a thousandth does."""
    coordinates = flows.coordinates_for(data[0], data[1])
    one = flows.spline(coordinates, n_layers=2, hidden=8)
    first = flows.origin(one)
    coordinates.whitening *= 1 + 1e-13
    assert flows.origin(one) == first
    coordinates.whitening *= 1.001
    assert flows.origin(one)["coordinates"] != first["coordinates"] and flows.origin(one)["prior"] == first["prior"]


def test_a_steep_map_is_kept_in_float64(data, monkeypatch):
    """A regression that contracts without bound leaves a flow whose file says float64; a gentle one stays."""
    gentle = recipes.fit(*data, config())
    assert gentle.flow.dtype == torch.float32 and gentle.inverse_error < flows.INVERSE_ERROR
    assert gentle.flow.metadata.training["inverse_error"] == gentle.inverse_error
    monkeypatch.setattr(flows, "INVERSE_ERROR", 1e-9)
    with pytest.warns(UserWarning, match="float64"):
        steep = recipes.fit(*data, config())
    assert steep.flow.dtype == torch.float64 and steep.inverse_error < 1e-9


@pytest.mark.parametrize(
    ("circles", "changes", "expected"),
    [
        (5, {}, (4, 0)),
        (1, {}, (0, None)),
        (0, {}, (0, None)),
        (11, {}, (0, None)),
        (5, {"torsion_layers": 0}, (0, None)),
        (5, {"line_bins": 6}, (4, 6)),
        (5, {"torsion_layers": 2, "line_bins": 6}, (2, 6)),
    ],
)
def test_layout_that_fits_the_molecule(circles, changes, expected):
    """Torsions get couplings of their own, and lines no bins, where there are two of each and nobody said otherwise."""
    config = recipes.FlowConfig(n_layers=4, **changes)
    architecture = config.architecture(torch.arange(11) < circles)
    assert (architecture["torsion_layers"], architecture["line_bins"]) == expected


def test_settings_without_a_value_are_shown(tmp_path):
    """As "none", each in its section, and the file reads back as what was printed."""
    text = recipes.print_config(RunConfig())
    missing = {"line_bins": "flow", "folder": "pairs", "patience": "teacher.train", "seconds": "regression.train"}
    for key, section in missing.items():
        own = text.split(f"[{section}]\n")[1].split("\n\n")[0]
        assert f'{key} = "none"' in own
    shown = sum(len(table) for table in _tables(RunConfig().model_dump()))
    assert sum(" = " in line for line in text.splitlines()) == shown
    (tmp_path / "run.toml").write_text(text)
    assert recipes.load_config(tmp_path / "run.toml") == RunConfig()


def test_settings_say_what_they_mean_and_may_be():
    """Beside each one; what may be anything of its type, and is called what it is, needs no remark."""
    shown = tomlkit.parse(recipes.print_config(RunConfig()))
    remarks = {key: item.trivia.comment for key, item in shown["teacher"]["train"].items()}
    assert remarks["clip"] == "# largest gradient norm"
    assert remarks["precision"].startswith("# float32 | mixed | bfloat16; mixed: gradients by")
    assert remarks["seed"] == remarks["learning_rate"] == ""
    assert shown["pairs"]["log_det"].trivia.comment == "# none | exact | hutchinson"
    for word in shown["flow"]["name"].trivia.comment.removeprefix("# ").split(" | "):
        assert recipes.FlowConfig(name=word).name == word


@pytest.mark.parametrize(
    "changes", [{"likelihood": {"train": {"patience": None}}}, {"pairs": {"folder": "/data/\U0001f600\x7f\"\\ü"}}]
)
def test_what_is_printed_reads_back(changes, tmp_path):
    """A value that the section's default has and this run has not, and characters that JSON writes in another way."""
    settings = RunConfig.model_validate(changes)
    (tmp_path / "run.toml").write_text(recipes.print_config(settings))
    assert recipes.load_config(tmp_path / "run.toml") == settings != RunConfig()


def _tables(table):
    """The plain settings of every section."""
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    return [plain, *(t for v in table.values() if isinstance(v, dict) for t in _tables(v))]


@pytest.mark.parametrize("objective", ["mle", "regflow"])
def test_a_molecule_in_a_field_is_learned_in_its_place(objective, tmp_path):
    """An atom in a well: its weights are worth something; turned and shifted about they are worth nothing."""
    well = Well()
    x = well.sample(4000, torch.Generator().manual_seed(0))
    potential = TorchPotential(well.system)
    train = {"steps": 300, "batch_size": 256, "warmup": 10, "learning_rate": 2e-3}
    settings = RunConfig.model_validate(
        {
            "coordinates": "cartesian",
            "objective": objective,
            "flow": {"n_layers": 6, "hidden": 32},
            "teacher": {"hidden": 32, "depth": 2, "train": train},
            "pairs": {"n": 4000, "n_steps": 4},
            "regression": {"train": train},
            "likelihood": {"train": train},
            "refinement": {"enabled": True, "rounds": 2, "pool": 2000, "batch_size": 200, "anchors": 500},
        }
    )
    kt = thermal_energy(TEMPERATURE)
    fitted = recipes.fit(None, x[:3500], x[3500:], settings, held=True, reduced_potential=lambda r: potential(r) / kt)
    fitted.flow.save(tmp_path / "flow.safetensors")
    flow = flows.Flow.load(tmp_path / "flow.safetensors")
    assert flow.coordinates.place == pytest.approx(x[:3500].mean((0, 1)).tolist())
    batch = FlowProposal(flow, potential, TEMPERATURE).sample(4000, torch.Generator().manual_seed(1))
    ess = reweighting.effective_sample_size(batch.log_weights)
    assert ess > 0.3
    assert ess > 0.5 * max(pool.ess for pool in fitted.rounds)  # and the refinement speaks of the same weights


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coordinates": "internal"}, "hold the molecule in its place"),
        ({"coordinates": "cartesian", "teacher": {"kind": "equivariant"}}, "is for free molecules"),
    ],
)
def test_choices_for_free_molecules_are_refused_in_a_field(data, changes, words):
    with pytest.raises(InputError, match=words):
        recipes.fit(*data, config(**changes), held=True)


@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
def test_every_method_of_the_teachers_can_be_chosen(method):
    assert RunConfig.model_validate({"pairs": {"method": method}}).pairs.method == method


def test_configuration_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(recipes.print_config(config()))
    assert recipes.load_config(path) == config()
    path.write_text("[flow]\nlayerz = 3\n")
    with pytest.raises(InputError, match=r"flow\.layerz"):
        recipes.load_config(path)
    path.write_text("flow = [")
    with pytest.raises(InputError, match="not TOML"):
        recipes.load_config(path)
    with pytest.raises(InputError, match="print-config"):
        recipes.load_config(tmp_path / "none.toml")


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not TOML"):
        recipes.load_config(path)


@pytest.mark.parametrize("place", ["flow", "teacher", "teacher.train", "pairs", "likelihood.train", "frames"])
def test_negative_seeds_are_refused(tmp_path, place):
    path = tmp_path / "run.toml"
    path.write_text(f"[{place}]\nseed = -1\n")
    with pytest.raises(InputError, match=rf"{place}\.seed"):
        recipes.load_config(path)


def test_teacher_file(data, tmp_path):
    result = recipes.fit(*data, config())
    teachers.save_teacher(tmp_path / "t.safetensors", result.field)
    again = teachers.load_teacher(tmp_path / "t.safetensors")
    x = torch.zeros(3, result.flow.dim)
    t = torch.full((3,), 0.5)
    assert torch.equal(again(t, x), result.field(t, x))


def test_one_key_of_a_section_leaves_its_other_defaults():
    """Those of the section, not those of a training run in general."""
    given = RunConfig.model_validate({"likelihood": {"train": {"steps": 300}}, "teacher": {"train": {"patience": 5}}})
    plain = RunConfig()
    assert given.likelihood.train == plain.likelihood.train.model_copy(update={"steps": 300})
    assert given.teacher.train == plain.teacher.train.model_copy(update={"patience": 5})
    assert given.regression == plain.regression


def test_a_folder_belongs_to_its_frames(data, tmp_path):
    topology, x, held_out = data
    recipes.fit(topology, x, held_out, config(), folder=tmp_path)
    with pytest.raises(IncompatibleFlowError, match="differs in its frames"):
        recipes.fit(topology, x + 0.001, held_out, config(), folder=tmp_path)


def test_a_folder_belongs_to_its_target(data, tmp_path):
    """A run that would go on for another System or temperature would say of the old flow that it is the new one's."""
    settings = config(objective="mle", likelihood={"train": {"steps": 2, "batch_size": 64}})
    metadata = FlowMetadata("a", {"sha256": "1"}, 300.0)
    recipes.fit(*data, settings, metadata=metadata, folder=tmp_path)
    recipes.fit(*data, settings, metadata=metadata, folder=tmp_path)
    for other, word in (
        (FlowMetadata("a", {"sha256": "2"}, 300.0), "system"),
        (FlowMetadata("a", {"sha256": "1"}, 600.0), "temperature"),
    ):
        with pytest.raises(IncompatibleFlowError, match=f"differs in its {word};"):
            recipes.fit(*data, settings, metadata=other, folder=tmp_path)


@pytest.mark.parametrize("name", ["config.json", "seconds.json"])
def test_a_torn_file_in_the_folder_is_named(data, tmp_path, name):
    short = {"steps": 2, "batch_size": 64}
    settings = config(objective="mle", frames={"copies": 2}, likelihood={"train": short})

    def mover(x, generator):
        return x, 0

    recipes.fit(*data, settings, folder=tmp_path, mover=mover)
    (tmp_path / name).write_text("")
    with pytest.raises(CorruptFileError, match=f"{name} is damaged"):
        recipes.fit(*data, settings, folder=tmp_path, mover=mover)


def test_a_folder_of_another_version_is_refused(data, tmp_path):
    recipes.fit(*data, config(objective="mle"), folder=tmp_path)
    path = tmp_path / "config.json"
    found = json.loads(path.read_text())
    found["config"]["flow"]["layerz"] = 1
    path.write_text(json.dumps(found))
    with pytest.raises(IncompatibleFlowError, match="another version"):
        recipes.fit(*data, config(objective="mle"), folder=tmp_path)
    path.write_text(config(objective="mle").model_dump_json())  # as folders were before they named their frames there
    with pytest.raises(IncompatibleFlowError, match="another version"):
        recipes.fit(*data, config(objective="mle"), folder=tmp_path)


@pytest.mark.parametrize("coordinates", ["internal", "cartesian"])
def test_frames_of_another_molecule_are_refused(data, coordinates):
    topology, x, held_out = data
    with pytest.raises(InputError, match=r"\(n, 22, 3\)"):
        recipes.fit(topology, x[:, :21], held_out[:, :21], config(coordinates=coordinates))


def test_an_unknown_method_is_refused_before_anything_is_trained(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[pairs]\nmethod = "midpont"\n')
    with pytest.raises(InputError, match=r"pairs\.method"):
        recipes.load_config(path)
