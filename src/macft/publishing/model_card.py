"""The model card of an adapter or a fused model: data, settings and results of its run.

A card is public. It names models and datasets by their ids on the hub only: no paths, hosts or names of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from macft import __version__
from macft.config.schema import TrainConfig
from macft.model.fetch.bundled import BUNDLED
from macft.report.result_text import result_name, result_text

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hub_id(name: str | None) -> str | None:
    """``name`` as the hub calls it: an id, or the published model that is bundled; None for a local path."""
    if name is None:
        return None
    if name in BUNDLED:
        return BUNDLED[name].hub_id
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def model_card(
    repo: str, *, base: str | None, is_adapter: bool, config: TrainConfig | None, summary: Mapping[str, Any]
) -> str:
    """The text of README.md.

    Args:
        repo: The id of the repository it is for.
        base: The base model's id on the hub, if it has one.
        is_adapter: Whether the files are an adapter, not a whole model.
        config: Of the run; None where it isn't known.
        summary: The content of the run's ``summary.json``.
    """
    datasets = [source for source in _sources(config) if hub_id(source) is not None]
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation="adapter" if is_adapter and base else None,
        datasets=datasets or None,
        tags=["mlx", "macft", *(["lora"] if is_adapter else [])],
    )
    text = "\n\n".join(
        filter(
            None,
            [_head(repo, base, is_adapter=is_adapter), *_run(config, summary), _use(repo, base, is_adapter=is_adapter)],
        )
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _head(repo: str, base: str | None, *, is_adapter: bool) -> str:
    what = "A LoRA adapter" if is_adapter else "A fine-tuned model"
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    return f"# {repo.rpartition('/')[2]}\n\n{what}{of}, trained with macft {__version__} on MLX."


def _run(config: TrainConfig | None, summary: Mapping[str, Any]) -> list[str]:
    if config is None:
        return []
    return [_data(config, summary), _settings(config, summary), _results(summary)]


def _sources(config: TrainConfig | None) -> list[str]:
    if config is None:
        return []
    return [source.path for source in config.dataset.sources] or [config.dataset.path or ""]


def _data(config: TrainConfig, summary: Mapping[str, Any]) -> str:
    names = []
    for source in _sources(config):
        if hub_id(source) is not None:
            names.append(f"[{source}](https://huggingface.co/datasets/{source})")
        else:
            names.append("macft's SQL questions" if source == "builtin:sql" else "local files")
    rows = summary.get("train_rows")
    counted = f": {rows:,} rows to train, {summary.get('valid_rows', 0):,} to validate" if rows else ""
    loss = "the answers only" if config.dataset.mask_prompt else "whole rows"
    return f"## Data\n\n{', '.join(dict.fromkeys(names))}{counted}. The loss is that of {loss}."


def _settings(config: TrainConfig, summary: Mapping[str, Any]) -> str:
    training, optimizer = config.training, config.optimizer
    rows = {
        "adapter": summary.get("adapter") or config.adapter.type,
        "steps": summary.get("steps") or training.steps,
        "batch size": training.batch_size,
        "longest row": f"{config.dataset.max_seq_length} tokens",
        "optimizer": f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {optimizer.schedule}",
        "dropout": config.adapter.dropout,
        "seed": config.seed,
        "nodes": summary.get("nodes"),
    }
    return "## Settings\n\n" + _table(("setting", "value"), [(k, v) for k, v in rows.items() if v is not None])


def _results(summary: Mapping[str, Any]) -> str:
    results: Mapping[str, Any] = summary.get("results") or {}
    rows = []
    for name, value in results.items():
        if name.endswith("_before") and name.removesuffix("_before") in results:
            continue  # shown in the row of its name
        rows.append((result_name(name), _number(name, results.get(f"{name}_before")), _number(name, value)))
    return "## Results\n\n" + _table(("on held-out rows", "before", "after"), rows) if rows else ""


def _use(repo: str, base: str | None, *, is_adapter: bool) -> str:
    if not is_adapter:
        return f'## Use\n\n```bash\npip install mlx-lm\nmlx_lm.generate --model {repo} --prompt "..."\n```'
    return (
        "## Use\n\n```bash\npip install mlx-lm\n"
        f"hf download {repo} --local-dir adapter\n"
        f'mlx_lm.generate --model {base or "BASE_MODEL"} --adapter-path adapter --prompt "..."\n```'
    )


def _number(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return result_text(name, value)


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)
