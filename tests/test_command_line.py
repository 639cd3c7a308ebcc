"""The command line: short forms, and one clear line for every mistake."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import macft
from harness.runs import train
from macft.config.command_line import prepare
from macft.config.nearest import schema_keys
from macft.config.paths import config_folder
from macft.config.schema import TrainConfig, register_schema
from macft.config.validate import to_typed
from macft.errors import ConfigError
from macft.topology.topology_file import load_topology

REPOSITORY = Path(__file__).parents[1]
RECIPE = "+recipe=llama-lora"

MISTAKES = [
    # (override, what the line must say)
    ("training.stepz=5", "training.stepz: no such key; did you mean training.steps?"),
    ("training.batchsize=4", "training.batchsize: no such key; did you mean training.batch_size?"),
    ("+training.stepz=5", "training.stepz: no such key; did you mean training.steps?"),
    ("training.seed=3", "training.seed: no such key; did you mean seed?"),
    ("report.wandb=true", "report.wandb: no such key; trackers are a list: 'report.trackers=[wandb]'"),
    ("report_to=wandb", "report_to: no such key; trackers are a list: 'report.trackers=[wandb]'"),
    (
        "topology.hosts=[a, b]",
        "topology.hosts: the shell has cut this at a space; quote it: 'topology.hosts=[a, b]'",
    ),
    (
        "dataset.columns=prompt:question dataset.columns=completion:answer",
        "dataset.columns: the shell has expanded the braces; quote it: "
        "'dataset.columns={prompt: question, completion: answer}'",
    ),
    ("dataset.columns=prompt:question", "braces are missing; quote it: 'dataset.columns={prompt: question}'"),
    ("lora.rank=8", "lora.rank: no such key; did you mean adapter.rank?"),
    ("iters=100", "iters: no such key; did you mean training.steps?"),
    ("lr=1e-4", "lr: no such key; did you mean optimizer.learning_rate?"),
    ("+learning_rate=1", "learning_rate: no such key; did you mean optimizer.learning_rate?"),
    ("training.steps=abc", "training.steps: 'abc' is not a whole number, such as 8"),
    ("training.steps=1.5", "training.steps: '1.5' is not a whole number, such as 8"),
    ("dataset.mask_prompt=perhaps", "dataset.mask_prompt: 'perhaps' is neither true nor false"),
    ("optimizer.learning_rate=fast", "optimizer.learning_rate: 'fast' is not a number, such as 1e-4"),
    ("adapter.targets=q_proj", "adapter.targets: it must be a list, such as [a,b]"),
    ("seed=null", "seed: null is not allowed here; it needs a value"),
    ("training=null", "training: null is none of its options"),
    ("training.steps=${oc.env:NO_SUCH_NAME}", "training.steps: Environment variable 'NO_SUCH_NAME' not found"),
    ("name=${nome}", "name: Interpolation key 'nome' not found"),
    ("model=smolm2-135m", "model: no option 'smolm2-135m'; did you mean model=smollm2-135m?"),
    ("model=gpt2", "smollm3-3b; or a Hugging Face id (org/name), or a path (./name)"),
    ("dataset=rows", "dataset: no option 'rows'; there are custom, "),
    ("adapter=lorra", "adapter: no option 'lorra'; did you mean adapter=lora?"),
    ("optimizer.name=adamv", "optimizer.name: 'adamv' is not one of adamw"),
    ("optimizer.learning_rate=-1", "optimizer.learning_rate: -1.0 must be greater than 0"),
    ("optimizer.learning_rate=inf", "optimizer.learning_rate: inf is not a finite number"),
    ("optimizer.learning_rate=1e400", "optimizer.learning_rate: inf is not a finite number"),
    ("optimizer.weight_decay=nan", "optimizer.weight_decay: nan is not a finite number"),
    ("optimizer.warmup_steps=64", "optimizer.warmup_steps: 64 must be 0 or more and less than training.steps"),
    ("optimizer.schedule=cosin", "did you mean 'cosine'?"),
    ("training.batch_size=0", "training.batch_size: 0 must be 1 or more"),
    ("training.micro_batch_size=0", "training.micro_batch_size: 0 must be 1 or more"),
    ("training.steps=null", "training.steps and training.epochs: give exactly one"),
    ("training.export=newest", "training.export: 'newest' is not best or last"),
    ("training.patience=3 training.eval_every=0", "training.patience: early stopping needs validations"),
    ("training.deterministic=true collective.codec=int8", "training.deterministic: does not go with collective.codec"),
    (
        "training.deterministic=true training.batch_size=2000 training.micro_batch_size=1",
        "more than 1024 micro-batches",
    ),
    ("hydra.job.chdir=true", "hydra.job.chdir: true is not supported; relative paths begin at the folder"),
    ("adapter.rank=0", "adapter.rank: 0 is too small"),
    ("adapter.rslora=true", "adapter.rslora: needs adapter.alpha"),
    ("adapter.layers=[1,2]", "adapter.layers: adapter.num_layers=16 chooses blocks, too; set that to -1"),
    ("adapter.type=lokr", "adapter.type: 'lokr' is not one of lora, dora, full"),
    ("adapter=full model.quantization=4bit", "adapter.type: full can't train a quantised base"),
    ("topology.nodes=2", "topology=single has 1 node, not 2; did you mean topology=local?"),
    ("topology=local topology.nodes=9", "training.batch_size: 8 rows can't be shared by 9 nodes"),
    ("topology=hosts", "topology.hosts: list two or more addresses"),
    ("topology=hosts topology.hosts=[a,b:99999]", "port 99999"),
    ("topology=hosts topology.hosts=[a,a]", "topology.hosts: an address is listed twice"),
    ("topology=hosts topology.hosts=[a,b] topology.rank=2", "topology.rank: 2 is not an index"),
    ("collective.patience=0", "collective.patience: 0.0 must be from 0.1"),
    ("dataset.sources=[{path:x}]", "dataset.path and dataset.sources: give one of them"),
    ("dataset.columns={promt:q}", "dataset.columns.promt: no such field; did you mean 'prompt'?"),
    ("dataset.max_seq_length=1", "dataset.max_seq_length: 1 must be 2 or more"),
    ("dataset.metric=sql_exec", "dataset.metric: no metric 'sql_exec'; did you mean 'sql_execution'?"),
    ("model.precision=fp16", "model.precision: 'fp16'"),
    ("seed=-1", "seed: -1 must be 0 or more"),
    ("seed=9223372036854775808", "seed: 9223372036854775808 must be below 2**63"),
    ("report.every=0", "report.every: 0 must be 1 or more"),
    ("training.steps", "training.steps: not understood; overrides are written key=value"),
    ("name=a b(", "name"),
    ("name=..", "name: '..' is no name for a run's folder"),
    ("name=", "name: '' is no name for a run's folder"),
    ("name=/tmp/x", "name: '/tmp/x' is no name for a run's folder"),
    ("hydra.run.dir=", "hydra.run.dir: nothing is given; name a folder"),
    ("+resume=", "resume: nothing is given; give a run's folder"),
    ("+resume=/no/such/folder", "resume: /no/such/folder does not exist"),
    ("+recipe=lama-lora", "recipe: no option 'lama-lora'; did you mean recipe=llama-lora?"),
]


@pytest.mark.parametrize(("mistake", "words"), MISTAKES, ids=[mistake for mistake, _ in MISTAKES])
def test_a_mistake_gives_one_clear_line(mistake: str, words: str) -> None:
    overrides = [mistake] if mistake.startswith("name=") else mistake.split()
    recipe = [] if "+recipe" in mistake else [RECIPE]
    with pytest.raises(ConfigError) as error:
        prepare([*recipe, *overrides])
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert error.value.exit_code == 2


def test_several_mistakes_give_a_line_each() -> None:
    with pytest.raises(ConfigError) as error:
        prepare([RECIPE, "adapter.rank=0", "training.batch_size=0", "report.every=0"])
    assert len(str(error.value).splitlines()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["training.stepz=5", "training.steps=abc", "topology.nodes=2", "model=smolm2"])
def test_a_mistake_ends_the_command_with_status_2(tmp_path: Path, mistake: str) -> None:
    done = train(RECIPE, mistake, cwd=tmp_path)
    assert done.status == 2
    assert done.output == ""
    assert re.fullmatch(r"error: [^\n]+\n", done.errors), done.errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model=org/name", ["model=custom", "model.path='org/name'"]),
        ("model=./folder", ["model=custom", "model.path='./folder'"]),
        ("model=mlx-community/Llama-3.2-1B-Instruct-4bit", ["model=custom"]),
        ("dataset=some/folder", ["dataset=custom", "dataset.path='some/folder'"]),
        ("dataset=builtin:sql", ["dataset=custom", "dataset.path='builtin:sql'"]),
        ("model=qwen3-0.6b", ["model=qwen3-0.6b"]),
        ("dataset=sql", ["dataset=sql"]),
    ],
)
def test_a_model_or_dataset_may_be_an_option_an_id_or_a_path(override: str, expected: list[str]) -> None:
    argv = prepare([RECIPE, override]).argv
    assert set(expected) <= set(argv)


@pytest.mark.parametrize(
    ("typed", "steps", "epochs"),
    [
        (["training.epochs=3"], None, 3.0),
        (["training.steps=50"], 50, None),
        (["training.epochs=3", "training.steps=null"], None, 3.0),
    ],
)
def test_what_is_typed_wins_over_the_recipes_other_measure(
    typed: list[str], steps: int | None, epochs: float | None
) -> None:
    job = prepare([RECIPE, *typed]).job
    assert job is not None
    assert (job.training.steps, job.training.epochs) == (steps, epochs)


def test_steps_and_epochs_typed_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.steps and training\.epochs: give exactly one"):
        prepare([RECIPE, "training.epochs=3", "training.steps=5"])


def test_flags_of_mlx_lm_are_answered_with_their_translation() -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(
            [
                *(RECIPE, "--iters", "600", "--learning-rate=1e-4", "--model", "me/mine", "--data", "--steps-per-eval"),
                *("--report-to", "swanlab"),
            ]
        )
    assert str(caught.value).splitlines() == [
        "--iters: overrides are written key=value: training.steps=600",
        "--learning-rate: overrides are written key=value: optimizer.learning_rate=1e-4",
        "--model: overrides are written key=value: model=me/mine",
        "--data: overrides are written key=value: dataset.path=VALUE",
        "--steps-per-eval: overrides are written key=value: training.eval_every=VALUE",
        "--report-to: overrides are written key=value: 'report.trackers=[swanlab]'",
    ]


def test_without_arguments_there_is_help_and_no_run(tmp_path: Path) -> None:
    done = train(cwd=tmp_path)
    assert (done.status, done.errors) == (0, "")
    assert "+recipe=" in done.output
    assert not list(tmp_path.iterdir())


def test_a_recipe_needs_no_plus() -> None:
    assert "+recipe=smoke" in prepare(["recipe=smoke"]).argv


def test_a_users_own_recipe_and_model(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - llama-lora\n  - override /model: tiny\n  - _self_\nname: mine\n"
    )
    (tmp_path / "model" / "tiny.yaml").write_text("path: /models/tiny\n")
    done = train("--config-dir", str(tmp_path), "+recipe=mine", "--cfg", "job", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert "name: mine" in done.output
    assert "path: /models/tiny" in done.output
    assert "steps: 64" in done.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# @package _global_\nname: a\nname: b\n", r"mine\.yaml, line 3: found duplicate key name$"),
        (
            "# @package _global_\ntraining:\n\tsteps: 3\n",
            r"mine\.yaml, line 3: found character '\\t' that cannot start",
        ),
        ("training: {steps: 3}\n", r"^recipe/mine: the first line must be: # @package _global_$"),
        ("# @package _global_\n- a\n", "^recipe/mine: a list, but keys with values belong there$"),
        (
            "# @package _global_\ntraining: {stepz: 3}\n",
            r"^recipe/mine: training\.stepz: no such key; did you mean training\.steps\?$",
        ),
        (
            "# @package _global_\ntraining: {steps: many}\n",
            "^recipe/mine: training.steps: 'many' is not a whole number",
        ),
        ("# @package _global_\nname: caf\udce9\n", "is not UTF-8 text"),
    ],
    ids=["twice", "tab", "no package", "list", "typo", "type", "latin-1"],
)
def test_a_mistake_in_a_recipe_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=words) as error:
        prepare(["--config-dir", str(tmp_path), "+recipe=mine"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "- a\n", "hosts: [10.0.0.1, 10.0.0.2]\n"], ids=["empty", "list", "no kind"])
def test_a_cluster_file_without_a_cluster_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """An empty one would train on this machine alone."""
    monkeypatch.setenv("MACFT_CONFIG", str(tmp_path))
    (tmp_path / "topology").mkdir()
    (tmp_path / "topology" / "desk.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"desk\.yaml: not a topology; it needs kind: and hosts:$"):
        load_topology("desk")
    with pytest.raises(
        ConfigError, match="topology" if text else r"desk\.yaml: not a topology; it needs kind:"
    ) as error:
        prepare([RECIPE, "topology=desk"])
    assert "\n" not in str(error.value)


def test_cfg_job_prints_the_whole_configuration(tmp_path: Path) -> None:
    done = train("+recipe=smoke", "--cfg", "job", cwd=tmp_path)
    assert done.status == 0
    for key in ("learning_rate:", "batch_size:", "max_seq_length:", "hosts:", "timeout:", "tensorboard:"):
        assert key in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_help_shows_a_newcomer_what_to_type(tmp_path: Path) -> None:
    done = train("--help", cwd=tmp_path)
    assert done.status == 0
    for words in (
        "python -m macft.train +recipe=llama-lora",
        "topology=local",
        "+resume=",
        "smollm2-135m",
        "learning_rate",
    ):
        assert words in done.output


OPTIONS = sorted((path.parent.name, path.stem) for path in config_folder().glob("*/*.yaml"))


@pytest.mark.parametrize(
    ("group", "option"),
    [
        pytest.param(group, option, id=f"{group}/{option}", marks=[] if group == "recipe" else pytest.mark.slow)
        for group, option in OPTIONS
    ],
)
def test_every_option_of_every_group_makes_a_valid_configuration(group: str, option: str) -> None:
    register_schema()
    more = {
        ("model", "custom"): ["model.path=org/name"],
        ("dataset", "custom"): ["dataset.path=folder"],
        ("topology", "hosts"): ["topology.hosts=[a,b]"],
        ("topology", "ssh"): ["topology.hosts=[a,b]"],
    }.get((group, option), [])
    override = f"+recipe={option}" if group == "recipe" else f"{group}={option}"
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        to_typed(compose("train", overrides=[override, *more]))


def test_recipes_are_the_repositorys() -> None:
    names = {path.stem for path in (REPOSITORY / "recipes").glob("*.yaml")}
    assert {option for group, option in OPTIONS if group == "recipe"} == names
    assert {"llama-lora", "qwen-lora", "llama-qlora", "llama-dora", "smoke"} <= names


def test_every_key_is_explained_where_it_is_declared() -> None:
    """A comment line stands above each field of each settings dataclass, and the schema has no other fields."""
    explained = set()
    for path in Path(macft.__file__).parent.rglob("*settings.py"):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        above = lines[item.lineno - 2].strip()
                        assert above.startswith("#"), f"{path}: {node.name}.{item.target.id} has no comment"
                        explained.add(item.target.id)
    leaves = {key.rsplit(".", 1)[-1] for key in schema_keys(TrainConfig) if "." in key}
    assert leaves <= explained
