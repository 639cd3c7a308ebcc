"""The commands of macft: each is a module with ``main(argv)``.

``macft NAME`` is the module ``macft.NAME`` at the top of the package or, where that is a package, its ``__main__``.
"""

from __future__ import annotations

from importlib.util import find_spec

COMMANDS = {
    "train": "fine-tune a model, on this machine or on several",
    "data": "show the rows of a dataset as a model is trained on them",
    "plan": "predict memory and time of a run, without starting it",
    "monitor": "show a run live, at the terminal or on a page in the browser",
    "generate": "ask the tuned model a question, or chat with it",
    "serve": "answer programs over HTTP, as OpenAI's API does",
    "evaluate": "compare the base model with the tuned one on held-out rows",
    "fuse": "merge the adapter into its base model, for other programs",
    "push": "put an adapter on the Hugging Face Hub, with a model card",
    "adapter": "convert an adapter to or from the format of Hugging Face's PEFT",
    "doctor": "check that this machine, or each host of a topology, is ready to train",
    "cluster": "set up a cluster of machines; list or remove clusters",
    "keys": "show this machine's key, and manage the machines it trusts",
    "completion": "print or install tab completion for bash, zsh or fish",
    "bench": "measure all-reduce speed between the machines of a topology",
}
"""Name and description, in the order in which ``macft`` lists them."""


def module_of(command: str) -> str:
    """The module of a command, which ``python -m macft.NAME`` runs, too."""
    name = f"macft.{command}"
    spec = find_spec(name)
    return f"{name}.__main__" if spec is not None and spec.submodule_search_locations is not None else name
