"""The paper's table on seconds: every kind of run, one budget, resumable, errors over seeds."""

import csv
import json
import math
import time

import numpy as np
import pytest
import torch

from openmm_regflow import paper
from openmm_regflow.cli import main
from openmm_regflow.errors import IncompatibleFlowError, InputError
from openmm_regflow.paper import Cell, PaperConfig, cells, run_table, table
from openmm_regflow.paper.table import SHORT

TINY = {
    "seconds": 1.0, "seeds": 1, "n_layers": 2, "hidden": 8, "depth": 1, "teacher_hidden": 16, "teacher_depth": 1,
    "ode_steps": 2, "batch_size": 64, "n": 200, "n_teacher": 100, "torsion_points": 50,
}  # fmt: skip


def tiny(**changes):
    return PaperConfig.model_validate(TINY | changes)


def test_every_run_of_the_table_is_listed_once():
    both = {"ablations": ("regularisers", "pairs"), "seconds": (2.0, 1.0)}
    config = tiny(seeds=3, **both, systems=("alanine-dipeptide", "alanine-tetrapeptide"))
    found = list(cells(config))
    assert len(found) == len(set(found)) == len({c.name for c in found}) == 3 * 2 * 2 * (1 + 9 + 4 + 3)
    assert [c.seconds for c in found[:34]] == [1.0] * 34 and found[34].seconds == 2.0
    assert sum(bool(c.variant) for c in cells(tiny(ablations=("regularisers",)))) == 4
    assert sum(bool(c.variant) for c in cells(tiny(ablations=("pairs",)))) == 3
    assert Cell("a", "spline", "regflow-reflow", "pairs-10000", 9.0, 0).n_pairs == 10_000
    assert Cell("a", "spline", "regflow-reflow", "log-det", 9.0, 0).regularisers == {"log_det": 1e-5}


def test_teacher_has_the_density_that_it_says():
    """Exact log q of the sampler against a brute-force Jacobian of its map, in float64."""
    from openmm_regflow.coordinates import CartesianMap
    from openmm_regflow.teachers import VectorField, integrate

    coordinates = CartesianMap(2, 0.2)
    field = VectorField(coordinates.circular, hidden=8, depth=1).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    sampler = paper.TeacherSampler(field, coordinates, 60)
    _, log_q = sampler.sample(3, torch.Generator().manual_seed(1))
    z = field.prior.sample(3, torch.Generator().manual_seed(1), torch.float64)
    h = 1e-5
    for k in range(3):
        steps = torch.cat([z[k] + h * torch.eye(6).double(), z[k] - h * torch.eye(6).double()])
        ends = coordinates.to_positions(integrate(field, steps, n_steps=60)[0])[0].flatten(1)
        log_det = torch.linalg.slogdet((ends[:6] - ends[6:]) / (2 * h))[1]
        assert float(log_q[k]) == pytest.approx(float(field.prior.log_prob(z[k : k + 1])[0] - log_det), abs=1e-3)
    assert not sampler.sample(3, torch.Generator().manual_seed(1), log_q=False)[1].any()


def test_one_row_of_each_method_end_to_end(capsys, tmp_path):
    """The command: teacher, MLE, OT and reflow of one architecture; a second call only reads."""
    options = [x for k, v in TINY.items() if k not in ("seconds", "seeds", "n") for x in ("--set", f"{k}={v}")]
    command = ["benchmark", "paper", "--seconds", "1", "--seeds", "1", "-n", "200", "-o", str(tmp_path / "t"), *options]
    command += ["--set", 'architectures=["spline"]']
    with pytest.raises(SystemExit) as done:
        main(command)
    out = capsys.readouterr().out
    assert done.value.code == 0 and "4 of 4" in out
    records = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "t").glob("*.json")}
    assert len(records) == 4 and not any("failed" in r for r in records.values())
    for record in records.values():
        # A second of training, and the last step, batch of pairs or transport that ran over it.
        assert 0.9 < record["training_seconds"] < 6.0
        assert math.isfinite(record["round_trip_rms"]) and record["seconds_200k"] > 0
    reflow = records["alanine-dipeptide-spline-regflow-reflow-1s-seed0"]
    assert set(reflow["seconds"]) == {"teacher", "pairs", "student"}
    # Its own teacher, with weights of its own, is judged beside it; flows by other methods have none.
    assert reflow["teacher"]["e_w1"] > 0 and reflow["teacher"]["n_weights"] == 100
    assert "teacher" not in records["alanine-dipeptide-spline-mle-1s-seed0"]
    assert records["alanine-dipeptide-cnf-flow-matching-1s-seed0"]["n_weights"] == 100
    assert len(list((tmp_path / "t").glob("*.png"))) == 4
    with open(tmp_path / "t" / "table.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["method"] for row in rows] == ["flow-matching", "mle", "regflow-ot", "regflow-reflow"]
    with_errors = ("E-W1 [kT]", "T-W2 [rad]", "clashes [%]", "wrong chirality [%]", "ESS [%]")
    assert all("±" in row[header] for row in rows for header in with_errors)  # of one seed, too
    short = (tmp_path / "t" / "table.md").read_text()
    assert "processor time" in short and all(f" {header} |" in short for header in SHORT)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "t").glob("*seed0.json")}
    with pytest.raises(SystemExit):
        main(command)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    with pytest.raises(IncompatibleFlowError, match="hidden"):
        run_table(tmp_path / "t", tiny(hidden=16))
    path = tmp_path / "t" / "alanine-dipeptide-spline-mle-1s-seed0.json"
    assert records[path.stem]["target"]["temperature"] == 300.0
    path.write_text(json.dumps(records[path.stem] | {"target": {"system": "another", "temperature": 600.0}}))
    with pytest.raises(IncompatibleFlowError, match="another system, temperature"):
        run_table(tmp_path / "t", tiny())
    path.write_text(json.dumps(records[path.stem] | {"device": "cuda:1"}))
    with pytest.raises(IncompatibleFlowError, match="another type of device"):
        run_table(tmp_path / "t", tiny())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("architecture", "method"),
    [("cnf", "flow-matching"), ("jet", "mle"), ("res_nvp", "regflow-ot"), ("spline", "regflow-reflow")],
)
def test_a_run_on_each_device(architecture, method, device):
    """Networks, pairs and energies are there; the budget is processor time on a CPU and wall-clock on a GPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    record, drawing = paper.run_cell(Cell("alanine-dipeptide", architecture, method, "", 0.5, 0), tiny(), device)
    assert device == "cpu" or torch.cuda.max_memory_allocated() > before  # it was there, and not on the CPU
    assert "failed" not in record and record["device"] == device and drawing is not None
    assert record["training_seconds"] > 0.4 and math.isfinite(record["e_w1"]) and record["seconds_200k"] > 0
    assert ("teacher" in record) is (method == "regflow-reflow")


def test_numbers_of_pairs(tmp_path):
    config = tiny()
    cell = Cell("alanine-dipeptide", "spline", "regflow-reflow", "pairs-300", 0.5, 0)
    record, _ = paper.run_cell(cell, config)
    assert record["n_pairs"] == 300 and record["seconds"]["student"] == pytest.approx(0.2, abs=0.3)


def test_errors_are_over_seeds():
    base = {"system": "a", "architecture": "spline", "method": "mle", "variant": "", "seconds": 75.0}
    same = {"ess": 0.1, "t_w2": None, "delta_f_phi_reference": [4.4, 0.26]}
    runs = [{"cell": base | {"seed": k}, "e_w1": v, **same} for k, v in enumerate((1.0, 2.0, 4.5))]
    runs[1]["delta_f_phi"] = [3.1, 0.4]  # the others lost the basin
    runs.append({"cell": base | {"seed": 3}, "failed": "diverged"})
    header, row = table(runs)
    cell = dict(zip(header, row))
    assert cell["E-W1 [kT]"] == f"2.5 ± {np.std([1, 2, 4.5], ddof=1) / 3**0.5:.2g}"
    assert cell["T-W2 [rad]"] == "–" and cell["seeds"] == "4 (1 failed)" and cell["ESS [%]"] == "10"
    assert cell["ΔF(φ) reference [kT]"] == "4.4 ± 0.26"  # its own: no seed had a part in it
    assert cell["ΔF(φ) [kT]"] == "3.1 ± 0.4 (1 of 3)"  # a mean of those that did well


def test_errors_of_a_single_seed_are_those_of_the_figure():
    cell = {"system": "a", "architecture": "spline", "method": "regflow-reflow", "variant": ""}
    cell |= {"seconds": 75.0, "seed": 0}
    run: dict = {"cell": cell, "ess": 0.1, "ess_error": 0.02, "delta_f_phi_reweighted": [3.5, 0.25], "e_w1": 7.0}
    run["teacher"] = {"delta_f_phi_reweighted": [4.0, 0.5], "ess": 0.3, "ess_error": 0.01}
    header, row = table([run])
    found = dict(zip(header, row))
    assert found["ESS [%]"] == "10 ± 2" and found["ΔF(φ) reweighted [kT]"] == "3.5 ± 0.25" and found["E-W1 [kT]"] == "7"
    assert found["own teacher: ESS [%]"] == "30 ± 1" and found["own teacher: ΔF(φ) reweighted [kT]"] == "4 ± 0.5"
    assert found["budget [s]"] == "75" and found["own teacher: T-W2 [rad]"] == "–"


def test_several_budgets_of_one_folder_make_a_plot(tmp_path):
    """Two budgets, one run each: rows of their own, and curves through both; a third call makes nothing anew."""
    config = tiny(seconds=(0.5, 1.0), architectures=("res_nvp",), methods=("regflow-ot",), teacher=False)
    rows = run_table(tmp_path, config)
    assert [dict(zip(rows[0], row))["budget [s]"] for row in rows[1:]] == ["0.5", "1"]
    records = [json.loads(p.read_text()) for p in tmp_path.glob("*seed0.json")]
    assert (tmp_path / "alanine-dipeptide-trends.png").stat().st_size > 10_000
    figure = paper.plot_trends(records, "alanine-dipeptide")
    drawn = figure.axes[0].containers[0].lines[0].get_xydata()
    assert drawn[:, 0].tolist() == [0.5, 1.0]
    assert drawn[:, 1].tolist() == [r["e_w1"] for r in sorted(records, key=lambda r: r["cell"]["seconds"])]
    assert paper.plot_trends(records[:1], "alanine-dipeptide") is None
    made = []
    again = run_table(tmp_path, tiny(architectures=("res_nvp",), methods=()), report=lambda name, *_: made.append(name))
    assert made[0].startswith("alanine-dipeptide-cnf") and len(again) == 4


def test_time_to_equal_energies():
    """E-W1 of likelihood is 4 at 4 s and then rises; regression falls as 1/t and slower, is there at once, or never."""
    curves = {
        ("spline", "mle"): (80.0, 4.0, 9.0),
        ("spline", "regflow-ot"): (32.0, 8.0, 2.0),
        ("spline", "regflow-reflow"): (7.0, 6.0, 5.0),
        ("jet", "mle"): (1.0, 1.0, 1.0),
        ("jet", "regflow-ot"): (3.0, 2.0, 2.0),
    }
    records = []
    for (architecture, method), values in curves.items():
        cell = {"system": "a", "architecture": architecture, "method": method, "variant": ""}
        for seconds, value in zip((1.0, 4.0, 16.0), values):
            records += [{"cell": cell | {"seconds": seconds, "seed": seed}, "e_w1": value} for seed in (0, 1)]
    _, *rows = paper.equal_times(records)
    found = {(row[1], row[4]): row[5:] for row in rows}
    assert found["spline", "regflow-ot"] == ("8", "200 %") and found["spline", "regflow-reflow"] == ("> 16", "> 400 %")
    assert found["jet", "regflow-ot"] == ("> 16", "> 1.6e+03 %") and rows[1][2:4] == ("4", "4")
    for record in records:
        if record["cell"]["method"] == "regflow-reflow":
            record["e_w1"] = 1.0
    assert ("a", "spline", "4", "4", "regflow-reflow", "≤ 1", "≤ 25 %") in paper.equal_times(records)
    assert paper.equal_times([r for r in records if r["cell"]["method"] != "mle"]) == []
    assert paper.equal_times([r for r in records if r["cell"]["seconds"] == 1.0]) == []
    for record in records:  # all runs of a method failed
        if record["cell"]["method"] == "regflow-ot":
            record["e_w1"] = None
    assert {row[4] for row in paper.equal_times(records)[1:]} == {"regflow-reflow"}


def test_budgets_count_processor_time_on_a_cpu():
    assert paper.clock_of(torch.device("cpu")) is time.process_time
    assert paper.clock_of(torch.device("cuda")) is time.monotonic


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="hiden"):
        paper.load_config({}, ["hiden=3"])
    with pytest.raises(InputError, match="positive"):
        paper.load_config({"seconds": ["60", "0"]}, [])
    with pytest.raises(InputError, match="ablations"):
        paper.load_config({"ablations": ["pears"]}, [])
    for lines, words in (
        (["hidden=20"], "heads"),
        (["teacher_kind=transformer", "teacher_hidden=30"], "teacher_hidden"),
        (["pair_numbers=[100]"], "batch of 256"),
    ):
        with pytest.raises(InputError, match=words):
            paper.load_config({"ablations": ["pairs"]}, lines)
    with pytest.raises(InputError, match="alanine-dipeptide"):
        run_table(tmp_path / "x", tiny(systems=("unobtainium",)))
    assert not (tmp_path / "x").exists()


def test_a_seed_of_the_table_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as done:
        main(["benchmark", "paper", "--seed", "1", "-o", str(tmp_path / "x")])
    assert done.value.code == 2 and "--seeds" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_unknown_benchmark(capsys):
    with pytest.raises(SystemExit) as done:
        main(["benchmark", "papers"])
    assert done.value.code == 2 and "known: speed, paper" in capsys.readouterr().err
