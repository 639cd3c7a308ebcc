"""Sweeps: which jobs they have, what a failed or interrupted job means, what a job returns, the closing table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore

from harness.runs import adapter, command, environment, free_ports, losses, train, wait_for_step
from macft.config.command_line import prepare
from macft.errors import ConfigError
from macft.report.sweep_table import SweepRow, SweepTable

SMOKE = "+recipe=smoke"
SAMPLER = {
    "_target_": "hydra_plugins.sampler.Sampler",
    "direction": "minimize",
    "max_failure_rate": 0.0,
    "params": None,
}


def jobs(*overrides: str) -> tuple[list[str], int | None]:
    """Swept keys and number of jobs of ``-m overrides``."""
    plan = prepare(["-m", SMOKE, *overrides]).sweep
    assert plan is not None
    return plan.swept, plan.jobs


def refusal(*argv: str) -> str:
    """Why the command is refused, in one line."""
    with pytest.raises(ConfigError) as error:
        prepare([SMOKE, *argv])
    assert error.value.exit_code == 2
    (line,) = str(error.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("override", "count"),
    [
        ("adapter.rank=choice(4,8)", 2),
        ("adapter.rank=range(4,9,2)", 3),
        ("adapter.rank=shuffle(range(4,7))", 3),
        ("adapter.rank=tag(small,sort(8,4))", 2),
        ("adapter.targets=[q_proj],[q_proj,v_proj]", 2),
        ("optimizer=glob(adam*)", 2),
        ("model=tag(mine,choice(org/a,org/b))", 2),
    ],
)
def test_a_sweep_is_written_in_hydras_grammar(override: str, count: int) -> None:
    swept, found = jobs(override)
    assert found == count
    assert len(swept) == 1


def test_a_sweep_over_models_by_id() -> None:
    argv = prepare(["-m", SMOKE, "model=org/a,org/b"]).argv
    assert "model.path='org/a','org/b'" in argv


def test_only_keys_with_several_values_are_swept_and_the_last_of_a_key_counts() -> None:
    assert jobs("seed=1,2", "adapter.rank=choice(4)", "training.steps=3,4", "training.steps=5") == (["seed"], 2)


def test_a_recipe_may_hold_the_swept_values(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    params = "hydra:\n  sweeper:\n    params:\n      seed: 1,2\n      adapter.rank: choice(4,{})\n"
    for name, rank in (("good", 8), ("bad", 0)):
        (tmp_path / "recipe" / f"{name}.yaml").write_text(
            "# @package _global_\ndefaults:\n  - smoke\n  - _self_\n" + params.format(rank)
        )
    plan = prepare(["--config-dir", str(tmp_path), "-m", "recipe=good"]).sweep
    assert plan is not None
    assert (plan.swept, plan.jobs) == (["seed", "adapter.rank"], 4)
    with pytest.raises(ConfigError, match=r"adapter\.rank: 0 is too small.*\(job 1, seed=1 adapter\.rank=0\)"):
        prepare(["--config-dir", str(tmp_path), "-m", "recipe=bad"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("adapter.rank=4,8", "adapter.rank: 4,8 means several runs; for macft.train add -m"),
        ("optimizer.learning_rate=interval(1e-5,1e-3)", "means several runs; for macft.train add -m"),
        ("-m optimizer.learning_rate=interval(1e-5,1e-3)", "needs a sweeper that chooses values from it"),
        ("-m optimizer.learning_rate=tag(log,interval(1e-5,1e-3))", "needs a sweeper that chooses values from it"),
        ("-m adapter.rank=range(8,4)", "adapter.rank: range(8,4) has no values"),
        ("-m adapter.rank=range(4,8,0)", "adapter.rank: range(4,8,0) has no values: "),
        ("-m model=glob(none*)", "model: glob(none*) has no values"),
        ("-m model=org/a,qwen3-0.6b", "model: qwen3-0.6b is a name and org/a is not"),
        ("-m hydra.sweeper=null", "hydra.sweeper: is not set"),
        ("-m --cfg job", "--cfg, --run and -m: give one of them"),
        ("-m hydra.sweep.subdir=a,b", "Sweeping over Hydra's configuration is not supported"),
        ("-m adapter.rank=8,-4 seed=1,2", "adapter.rank: -4 is too small; use 1 or more (8 is usual) (job 2, seed=1"),
        (
            "-m adapter=lora,lorra",
            "did you mean adapter=lora? There are dora, full, lora, rslora (job 1, adapter=lorra)",
        ),
        ("-m adapter.rank=${none},4", "(job 0, adapter.rank="),
        # Too many jobs to compose each: the last value is among those that are tried.
        ("-m seed=range(40,-3,-1) adapter.rank=4,8", "seed: -2 must be 0 or more (a job with seed=-2"),
    ],
)
def test_what_a_sweep_can_not_have_is_one_line_before_the_first_job(argv: str, words: str) -> None:
    line = refusal(*argv.split())
    assert all(word in line for word in words.split(" (job 2, seed=1")), line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.rank=int(interval(-2,8))", "adapter.rank: -2 is too small; use 1 or more (8 is usual) (a job with"),
        ("adapter.rank=interval(2,8)", "for whole numbers write int(interval(...))"),
        ("optimizer.learning_rate=interval(1e-3,1e-5)", "interval(1e-3,1e-5) ends before it begins"),
        ("training.eval_every=0", "report.objective: valid_loss needs validations; set training.eval_every"),
        ("report.objective=metric dataset.metric=null", "report.objective: metric needs dataset.metric and training.m"),
        ("report.objective=metric training.metric_rows=4", "add hydra.sweeper.direction=maximize"),
        (
            "report.objective=metric dataset.metric=perplexity training.metric_rows=4 hydra.sweeper.direction=maximize",
            "report.objective=metric is better where it is lower; add hydra.sweeper.direction=minimize",
        ),
        ("hydra.sweeper.direction=maximize", "add hydra.sweeper.direction=minimize"),
        ("topology=hosts topology.hosts=[a,b]", "use topology=ssh"),
    ],
)
def test_a_sampled_sweep_is_refused_where_the_jobs_would_return_nothing_useful(override: str, words: str) -> None:
    ConfigStore.instance().store(group="hydra/sweeper", name="sampler", node=SAMPLER)
    assert words in refusal("-m", "hydra/sweeper=sampler", *override.split())


def row(number: int, status: str = "finished", **fields: Any) -> SweepRow:
    values = {"adapter.rank": number, "optimizer.learning_rate": 1e-4, "seed": 0}
    return SweepRow(number, str(number), values, status, **fields)


def test_the_table_has_what_varies_first_and_names_the_best() -> None:
    reason = "step 2: the loss is nan and a lower learning rate usually helps"
    rows = [
        row(4, loss=1.5, valid_loss=1.25, metrics={"exact_match": 0.5}, objective=1.25, seconds=61),
        row(8, "failed", reason=reason, loss=1e12),
        row(16, "early_stopped", loss=1.0, valid_loss=1.0, objective=1.0, seconds=3700),
    ]
    table = SweepTable(rows, ["adapter.rank"], "valid_loss", False, 5)
    assert table.count == "1 finished, 1 failed, 1 early stop, 2 not started"
    lines = table.text(None).splitlines()
    assert lines[0].split() == ["rank", "loss", "valid", "exact", "match", "time", "folder", "status"]
    assert lines[1].split() == ["4", "1.500", "1.250", "50.0%", "1:01", "4", "finished"]
    assert lines[3] == f"  {reason}"
    assert lines[-1] == "best: 16 (adapter.rank=16): validation loss 1.000"
    assert SweepTable(rows, [], "exact_match", True, 5).best == rows[0]


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_the_table_fits_the_terminal(width: int) -> None:
    rows = [row(number, "failed", reason="a reason of many words " * 4, loss=0.5) for number in (4, 8)]
    text = SweepTable(rows, ["adapter.rank", "optimizer.learning_rate"], "valid_loss", False, 2).text(width)
    assert max(map(len, text.splitlines())) <= max(width, 26)  # of the narrowest, a key and its value
    assert text.count("failed") == 2
    assert len(text.splitlines()[0].split()) == (6 if width >= 60 else 2)


def test_at_60_columns_titles_are_broken_rather_than_the_table() -> None:
    rows = [row(8, "early_stopped", loss=1.5, valid_loss=12.5), row(16, loss=12.25, valid_loss=1.5)]
    lines = SweepTable(rows, ["adapter.rank", "optimizer.learning_rate"], "valid_loss", False, 2).text(60).splitlines()
    assert lines[0].split() == ["rank", "learning_", "loss", "valid", "time", "folder", "status"]
    assert lines[1].split() == ["rate"]
    assert lines[2].split() == ["8", "0.0001", "1.500", "12.500", "0:00", "8", "early", "stop"]


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    """Overrides for a very short run of a tiny model."""
    more = ["dataset.metric=null", "training.batch_size=4", "training.steps=2", "training.eval_every=2"]
    return [*tiny_task, *more, "training.save_every=0", "report.every=1"]


def result(folder: Path) -> dict[str, Any]:
    """A sweep's sweep.json."""
    return json.loads((folder / "sweep.json").read_text())


def statuses(folder: Path) -> list[str]:
    return [job["status"] for job in result(folder)["jobs"]]


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_failed_job(tmp_path: Path, basics: list[str]) -> None:
    rates = "optimizer.learning_rate=1e-4,1e38,1e-3"
    done = train("-m", *basics, "training.steps=3", rates, "hydra.sweep.dir=s", cwd=tmp_path)
    assert done.status == 1
    assert "Traceback" not in done.errors
    folder = tmp_path / "s"
    assert statuses(folder) == ["finished", "failed", "finished"]
    failed = result(folder)["jobs"][1]
    assert "the loss is" in failed["reason"]
    assert f"error: {failed['reason']}" in done.errors
    table = done.output[done.output.index("Sweep: 2 finished, 1 failed") :]
    assert failed["reason"] in table
    assert table.splitlines()[2].split() == ["learning_rate", "loss", "valid", "time", "folder", "status"]
    assert failed["reason"] in (folder / "sweep.md").read_text()
    best = min((0, 2), key=lambda number: result(folder)["jobs"][number]["valid_loss"])
    assert result(folder)["best"] == best
    assert len(losses(folder / "2")) == 3


@pytest.mark.slow
def test_ctrl_c_ends_the_sweep_with_what_is_done_in_the_table(tmp_path: Path, basics: list[str]) -> None:
    argv = ["-m", *basics, "training.steps=2,100000,3", "hydra.sweep.dir=s"]
    process = subprocess.Popen(
        command(*argv), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process:
        wait_for_step(process, tmp_path / "s" / "1")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert statuses(tmp_path / "s") == ["finished", "interrupted"]
    assert "Sweep: 1 finished, 1 interrupted, 1 not started" in output
    assert not (tmp_path / "s" / "2").exists()


@pytest.mark.slow
def test_jobs_on_several_processes_of_this_machine(tmp_path: Path, basics: list[str]) -> None:
    local = ["topology=local", "topology.nodes=2", "optimizer.learning_rate=1e38,1e-3", "training.steps=3"]
    # In batches of one job: a failed job ends neither its batch nor the next ones.
    done = train("-m", *basics, *local, "hydra.sweeper.max_batch_size=1", "hydra.sweep.dir=s", cwd=tmp_path)
    assert done.status == 1, done.errors
    assert statuses(tmp_path / "s") == ["failed", "finished"]
    assert "the loss is" in result(tmp_path / "s")["jobs"][0]["reason"]


@pytest.mark.slow
def test_why_a_rank_could_not_begin_is_in_the_table(tmp_path: Path, basics: list[str]) -> None:
    local = ["topology=local", "topology.nodes=2", f"adapter.init_from=null,{tmp_path / 'none'}"]
    done = train("-m", *basics, *local, "hydra.sweep.dir=s", cwd=tmp_path)
    assert done.status == 1
    assert statuses(tmp_path / "s") == ["finished", "failed"]
    assert str(tmp_path / "none") in result(tmp_path / "s")["jobs"][1]["reason"]


@pytest.mark.slow
def test_two_hosts_run_the_same_sweep_on_the_same_ports(tmp_path: Path, basics: list[str]) -> None:
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    rates = "optimizer.learning_rate=1e-4,1e38,1e-3"
    processes = []
    for rank in range(2):
        hosts = ["topology=hosts", f"topology.hosts=[{addresses}]", f"topology.rank={rank}", "training.steps=3"]
        argv = command("-m", *basics, *hosts, rates, f"hydra.sweep.dir={rank}")
        processes.append(
            subprocess.Popen(
                argv, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    for rank in range(2):
        assert statuses(tmp_path / str(rank)) == ["finished", "failed", "finished"], outputs[rank]


@pytest.mark.slow
def test_a_sweep_has_a_folder_and_an_hparams_session_for_each_job(tmp_path: Path, basics: list[str]) -> None:
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    done = train("-m", *basics, "adapter.rank=2,4", f"hydra.sweep.dir={tmp_path}", cwd=tmp_path)
    assert done.status == 0, done.errors
    for job, rank in (("0", 2), ("1", 4)):
        assert adapter(tmp_path / job)["model.layers.0.self_attn.q_proj.lora_a"].shape[1] == rank
        assert len(losses(tmp_path / job)) == 2
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    metadata = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", False, metadata, None)
    request = api_pb2.ListSessionGroupsRequest(
        col_params=[api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos],
        allowed_statuses=[api_pb2.STATUS_SUCCESS],
        slice_size=10,
    )
    handler = list_session_groups.Handler(RequestContext(), context, "", request)
    groups = handler.run().session_groups
    assert sorted(group.hparams["adapter.rank"].number_value for group in groups) == [2, 4]
    assert all(any(value.value > 0 for value in group.metric_values) for group in groups)


PLUGIN = '''
"""A sweeper that chooses: the last job repeats the best one of those before."""
import json
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

NODE = {"_target_": "hydra_plugins.sampler.Sampler", "direction": "minimize", "max_failure_rate": 0.0, "params": None}
ConfigStore.instance().store(group="hydra/sweeper", name="sampler", node=NODE)


class Sampler(Sweeper):
    def __init__(self, direction, max_failure_rate, params):
        self.direction, self.rate = direction, max_failure_rate

    def setup(self, *, hydra_context, task_function, config):
        self.folder = config.hydra.sweep.dir
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        fixed = [text for text in arguments if "interval" not in text]
        values = {}
        for number, rate in enumerate((1e-5, 1e38, 1e-2, None)):
            best = min if self.direction == "minimize" else max
            rate = rate or best(values, key=values.get)
            (done,) = self.launcher.launch([[*fixed, f"optimizer.learning_rate={rate}"]], initial_job_idx=number)
            try:
                values[rate] = done.return_value
            except Exception:
                if self.rate < 1.0:
                    raise
        with open(f"{self.folder}/values.json", "w") as file:
            json.dump(values, file)
'''


def sample(tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs a sweep with the sweeper above, in the folder ``s``."""
    package = tmp_path / "plugins" / "hydra_plugins" / "sampler"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PLUGIN)
    paths = [str(tmp_path / "plugins"), os.environ.get("PYTHONPATH", "")]
    argv = command("-m", "hydra/sweeper=sampler", "optimizer.learning_rate=interval(1e-5,1e38)", *overrides)
    variables = {**environment(), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [*argv, "hydra.sweep.dir=s"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_a_sweeper_that_chooses_gets_the_validation_loss(tmp_path: Path, basics: list[str]) -> None:
    done = sample(tmp_path, *basics, "training.steps=3")
    assert done.returncode == 1, done.stderr  # the job that diverged; the sweep went on after it
    rows = result(tmp_path / "s")["jobs"]
    assert [job["status"] for job in rows] == ["finished", "failed", "finished", "finished"]
    values = json.loads((tmp_path / "s" / "values.json").read_text())
    assert values == {"1e-05": rows[0]["valid_loss"], "0.01": rows[2]["valid_loss"]}
    best = min(values, key=lambda rate: values[rate])
    assert rows[3]["values"]["optimizer.learning_rate"] == float(best)
    assert rows[3]["valid_loss"] == values[best]


@pytest.mark.slow
def test_a_sweeper_that_chooses_gets_the_metric_if_that_is_the_objective(tmp_path: Path, basics: list[str]) -> None:
    metric = ["dataset.metric=exact_match", "training.metric_rows=2", "training.metric_max_tokens=2"]
    objective = ["report.objective=metric", "hydra.sweeper.direction=maximize", "hydra.sweeper.max_failure_rate=0.5"]
    done = sample(tmp_path, *basics, *metric, *objective)
    # More jobs than the user allows have failed, so the sweeper ends; that is no traceback.
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    rows = result(tmp_path / "s")["jobs"]
    assert [job["status"] for job in rows] == ["finished", "failed"]
    assert rows[0]["objective"] == rows[0]["metrics"]["exact_match"]


def test_optuna_that_is_not_installed_is_one_line() -> None:
    without_plugins = "import hydra_plugins; hydra_plugins.__path__ = []; import sys; sys.argv[0] = 'macft'"
    call = f"sys.exit(run_command(main, ['-m', '{SMOKE}', 'hydra/sweeper=optuna']))"
    code = f"{without_plugins}; from macft.cli.run_command import run_command; from macft.train import main; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "python3 -m pip install hydra-optuna-sweeper" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_optuna(tmp_path: Path, basics: list[str]) -> None:
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    rates = "optimizer.learning_rate=tag(log,interval(1e-5,1e-2))"
    done = train("-m", *basics, *optuna, rates, "adapter.rank=choice(2,4)", "hydra.sweep.dir=s", cwd=tmp_path)
    assert done.status == 0, done.errors
    found = result(tmp_path / "s")
    assert found["keys"] == ["optimizer.learning_rate", "adapter.rank"]
    best = min(job["valid_loss"] for job in found["jobs"])
    assert f"best_value: {best}" in (tmp_path / "s" / "optimization_results.yaml").read_text()
